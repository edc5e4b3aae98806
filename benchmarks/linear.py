"""PyTorch's linear layer in float32 against the same by oneDNN, forward and with backward, from few rows to many.

    python benchmarks/linear.py --out benchmarks/results/linear.json

The figures behind `Linear` and `WORTHWHILE` in `src/tokenfusion/layers/fast.py`.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from common import environment, time_in_turns, with_backward
from tokenfusion.files import write_json
from tokenfusion.layers.fast import OneDNNLinear

SHAPES = [  # rows, inputs, outputs
    (1, 384, 1000),
    (64, 128, 128),
    (32, 256, 256),
    (65, 96, 288),
    (197, 256, 768),
    (1576, 256, 768),
    (1576, 768, 256),
    (3208, 128, 384),
    (3152, 384, 1152),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    ways = {"PyTorch": F.linear, "oneDNN": OneDNNLinear.apply}
    result: dict[str, Any] = {**environment(), "unit": "ms per call, median", "results": []}
    for rows, inputs, outputs in SHAPES:
        frozen = [torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)]
        learning = [tensor.clone().requires_grad_() for tensor in frozen]
        forward = time_in_turns({name: partial(way, *frozen) for name, way in ways.items()}, options.repetitions)
        calls = {name: partial(with_backward, way, learning) for name, way in ways.items()}
        both = time_in_turns(calls, options.repetitions)
        row = {
            "rows, inputs, outputs": [rows, inputs, outputs],
            "multiply-adds": rows * inputs * outputs,
            "forward": forward | {"speed-up": forward["PyTorch"] / forward["oneDNN"]},
            "with backward": both | {"speed-up": both["PyTorch"] / both["oneDNN"]},
        }
        result["results"].append(row)
        print(row, flush=True)
    write_json(options.out, result)


if __name__ == "__main__":
    main()
