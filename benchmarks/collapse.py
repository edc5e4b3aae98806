"""The analysis of attention collapse against plain forward passes over the same images, fp32, in turns.

    python benchmarks/collapse.py --out benchmarks/results/collapse.json

deepvit_16 on 256 images of 224 px: a batch passes through a copy of the model, then it is analysed, then the next. And
the most memory that a process held while it analysed a few images, with deepvit_l_384 as well, whose 32 blocks see 577
tokens; maps do not pile up from image to image.
"""

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from common import environment
from tokenfusion import create_model
from tokenfusion.analyze.collapse import measure_collapse
from tokenfusion.files import write_json
from tokenfusion.hardware import default_device, keep_freed_memory, peak_memory_mb

BATCH = 8
MEMORY_OF = {"deepvit_16": (224, 32), "deepvit_l_384": (384, 4)}
"""Size of the images, and how many are analysed for the peak of memory."""


def peak_mb(name: str) -> float:
    """Peak memory of an analysis in a process of its own, in MiB."""
    words = [sys.executable, __file__, "--peak-of", name]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def analyse_once(name: str) -> float:
    keep_freed_memory()
    size, count = MEMORY_OF[name]
    model = create_model(name).to(default_device())
    measure_collapse(model, torch.randn(count, 3, size, size, device=default_device()).split(BATCH))
    return peak_memory_mb(default_device())


@torch.inference_mode()
def time_analysis(num_images: int) -> dict[str, float]:
    """Seconds of plain passes and of the analysis over the same images, and their ratio."""
    keep_freed_memory()  # as the command does
    device = default_device()
    model = create_model("deepvit_16").eval().to(device)
    plain_model = copy.deepcopy(model)  # one that nobody observes
    plain = 0.0

    def passed() -> Iterator[Tensor]:
        nonlocal plain
        for start in range(0, num_images, BATCH):
            batch = torch.randn(min(BATCH, num_images - start), 3, 224, 224, device=device)
            begun = now(device)
            plain_model(batch)
            plain += now(device) - begun
            yield batch

    plain_model(torch.randn(BATCH, 3, 224, 224, device=device))
    measure_collapse(model, [torch.randn(BATCH, 3, 224, 224, device=device)])
    begun = now(device)
    measure_collapse(model, passed())
    analysis = now(device) - begun - plain
    return {"plain": plain, "analysis": analysis, "ratio": analysis / plain}


def now(device: torch.device) -> float:
    """Seconds, all work on the device being done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--peak-of", choices=MEMORY_OF, help="analyse once with this model and print the peak in MiB")
    options = parser.parse_args()
    if options.peak_of:
        print(analyse_once(options.peak_of))
        return
    result = environment() | {"images": options.num_images, "unit": "seconds", **time_analysis(options.num_images)}
    result["peak memory, MiB"] = {name: peak_mb(name) for name in MEMORY_OF}
    print(result)
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
