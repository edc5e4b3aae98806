"""timm's building blocks against this package's: milliseconds of a training step and of inference, in turns.

    python benchmarks/parts.py --out benchmarks/results/parts.json

The choice that the header of `src/tokenfusion/models/presets.py` tells of. The CNN: `ConvTrunk` as the micro
models have it, against a trunk of timm's `BasicBlock` (ResNet's) with the same widths and reductions and about the
same multiply-adds. The transformer: `Block` with `SelfAttention` against timm's `Block`, same widths.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.resnet import BasicBlock
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import environment, time_in_turns
from tokenfusion.files import write_json
from tokenfusion.hardware import autocast, default_device, keep_freed_memory
from tokenfusion.layers.attend import SelfAttention
from tokenfusion.layers.blocks import Block
from tokenfusion.models.convnet import ConvTrunk

STEM, DIMS = 16, (48, 96, 112)


def timm_trunk() -> nn.Module:
    """ResNet's blocks, one a stage; the first convolution of a stage strides."""
    stem = nn.Sequential(nn.Conv2d(3, STEM, 3, padding=1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU())
    stages = []
    for before, dim in zip((STEM, *DIMS[:-1]), DIMS, strict=True):
        shortcut = nn.Sequential(nn.Conv2d(before, dim, 1, stride=2, bias=False), nn.BatchNorm2d(dim))
        stages.append(nn.Sequential(BasicBlock(before, dim, stride=2, downsample=shortcut), BasicBlock(dim, dim)))
    return nn.Sequential(stem, *stages)


def macs(model: nn.Module, inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(inputs[:1])
    return counter.get_total_flops() // 2


def infer(model: nn.Module, inputs: Tensor) -> None:
    with torch.inference_mode(), autocast(default_device(), "auto"):
        model(inputs)


def step(model: nn.Module, inputs: Tensor) -> None:
    with autocast(default_device(), "auto"):
        loss = model(inputs).float().square().mean()
    loss.backward()  # type: ignore[no-untyped-call]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    keep_freed_memory()
    images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    tokens = torch.randn(128, 33, 64)
    ours = ConvTrunk(3, STEM, (1, 2, 2, 2), DIMS, (1, 1, 1))
    pairs: dict[str, tuple[dict[str, nn.Module], Tensor]] = {
        "CNN": ({"ours": ours, "timm": timm_trunk()}, images),
        "transformer": ({"ours": Block(64, SelfAttention(64, 2), 2.0), "timm": TimmBlock(64, 2, 2.0, True)}, tokens),
    }
    result: dict[str, Any] = {**environment(), "unit": "ms for a batch of 128, median", "results": []}
    for part, (models, inputs) in pairs.items():
        placed = {name: model.to(memory_format=torch.channels_last) for name, model in models.items()}
        row: dict[str, Any] = {"part": part, "macs": {name: macs(model, inputs) for name, model in placed.items()}}
        for what, call, training in (("inference", infer, False), ("training step", step, True)):
            ways = {name: partial(call, model.train(training), inputs) for name, model in placed.items()}
            times = time_in_turns(ways, options.repetitions)
            row[what] = times | {"timm / ours": times["timm"] / times["ours"]}
        result["results"].append(row)
        print(row)
    write_json(options.out, result)


if __name__ == "__main__":
    main()
