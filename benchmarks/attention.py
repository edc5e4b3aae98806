"""Attention by PyTorch's fused kernel against two plain products, forward and with backward.

    python benchmarks/attention.py --out benchmarks/results/attention.json

The figures behind `prefers_products` in `src/tokenfusion/layers/fast.py`.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import environment, time_in_turns, with_backward
from tokenfusion.files import write_json
from tokenfusion.layers.attend import attention_map

SHAPES = [(128, 3, 81, 32), (128, 3, 33, 32), (16, 3, 197, 64), (8, 6, 393, 64), (1, 12, 393, 64), (4, 6, 785, 64)]


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention_map(query, key) @ value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    ways = {"fused": F.scaled_dot_product_attention, "plain": plain}
    result: dict[str, Any] = {**environment(), "unit": "ms per call, median", "results": []}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            batch, heads, tokens, width = shape
            packed = torch.randn(batch, tokens, 3, heads, width, dtype=dtype).permute(2, 0, 3, 1, 4)
            frozen = list(packed.unbind(0))
            learning = [part.detach().requires_grad_() for part in frozen]
            calls = {name: partial(way, *frozen) for name, way in ways.items()}
            forward = time_in_turns(calls, options.repetitions)
            calls = {name: partial(with_backward, way, learning) for name, way in ways.items()}
            both = time_in_turns(calls, options.repetitions)
            row = {
                "dtype": str(dtype).removeprefix("torch."),
                "batch, heads, tokens, head width": shape,
                "forward": forward | {"fused / plain": forward["fused"] / forward["plain"]},
                "with backward": both | {"fused / plain": both["fused"] / both["plain"]},
            }
            result["results"].append(row)
            print(row)
    write_json(options.out, result)


if __name__ == "__main__":
    main()
