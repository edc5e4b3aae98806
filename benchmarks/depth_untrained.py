"""How alike blocks' attention is at random initialisation, for the models of `benchmarks/depth.py`: the control of it.

    python benchmarks/depth_untrained.py CIFAR10 --out benchmarks/results/depth_untrained.json

Neighbours' cosine similarity of maps before the heads are mixed and of those that the values are multiplied by, each as
they are and centred: less a row's mean, so that positive and normalised maps can be compared. BatchNorm's statistics
are of the same images, in one pass.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from common import environment
from depth import register
from tokenfusion import create_model
from tokenfusion.analyze.attention_metrics import block_cosines
from tokenfusion.analyze.record import record_attention
from tokenfusion.data.decoded import read_images
from tokenfusion.data.open import open_dataset
from tokenfusion.files import write_json
from tokenfusion.metrics import t_interval

IMAGES = 64


def neighbours(maps: Sequence[Tensor]) -> dict[str, float]:
    """Mean similarity of blocks next to each other, of maps (B, H, N, M) as they are and centred."""
    centred = [one - one.mean(-1, keepdim=True) for one in maps]
    ways = {"as it is": maps, "centred": centred}
    return {way: block_cosines(of_way).diagonal(1, -2, -1).mean().item() for way, of_way in ways.items()}


@torch.no_grad()
def measure(model: nn.Module, images: Tensor) -> dict[str, dict[str, float]]:
    """Similarities before mixing and as applied."""
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
    model.train()(images)
    with record_attention(model.eval(), reduce=lambda record: (record.map, record.applied)) as records:
        model(images)
    maps = [record.reduced.pop() for record in records.values()]
    return {"before mixing": neighbours([before for before, _ in maps]), "applied": neighbours([to for _, to in maps])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24, 32])
    parser.add_argument("--dim", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    options = parser.parse_args()
    source = open_dataset(options.data)
    test = [place for place, part in enumerate(source.splits) if part == "test"][:IMAGES]
    read, _ = read_images(source, test, max_pixels=10**6, cache_bytes=2**24, split="test")
    images = torch.stack([read[place] for place in range(len(read))]).float() / 127.5 - 1
    rows = []
    for name, (depth, re_attends) in register(options.depths, options.dim).items():
        seeds = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            seeds.append(measure(create_model(name), images))
        row = {"depth": depth, "re_attention": re_attends}
        for stage in ("before mixing", "applied"):
            for way in ("as it is", "centred"):
                values = [one[stage][way] for one in seeds]
                row[f"{stage}, {way}"] = {"mean": fmean(values), "ci95": list(t_interval(values) or ())}
        rows.append(row)
        print(row, flush=True)
    write_json(options.out, environment() | {"images": IMAGES, "seeds": options.seeds, "rows": rows})


if __name__ == "__main__":
    main()
