"""Training steps of a micro model with glibc as it comes, and told to keep freed memory, in processes that take turns.

    python benchmarks/allocator.py --out benchmarks/results/allocator.json

The figures behind `keep_freed_memory` in `src/tokenfusion/hardware.py`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import tokenfusion
from common import environment
from tokenfusion.files import write_json
from tokenfusion.hardware import autocast, default_device, keep_freed_memory


def measure(keep: bool, batch_size: int = 128, steps: int = 30) -> dict[str, float]:
    """Images per second and page faults per step of training, in this process."""
    if keep:
        keep_freed_memory()
    model = tokenfusion.create_model("tokenfusion_early_micro").train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,))

    def step() -> None:
        with autocast(default_device()):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        step()
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(steps):
        step()
    passed = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "images_per_s": batch_size * steps / passed,
        "page_faults_per_step": (after.ru_minflt - faults) / steps,
        "peak_memory_mb": after.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--child", choices=("default", "kept"), help="measure in this process and print JSON")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child == "kept")))
        return
    result: dict[str, Any] = environment()
    rows: dict[str, list[dict[str, float]]] = {"default": [], "kept": []}
    for _ in range(options.repetitions):
        for name, measured in rows.items():
            output = subprocess.run(
                [sys.executable, __file__, "--child", name], check=True, capture_output=True, text=True
            )
            measured.append(json.loads(output.stdout))
    for name, measured in rows.items():
        result[name] = {key: statistics.median(row[key] for row in measured) for key in measured[0]}
    pairs = zip(rows["kept"], rows["default"], strict=True)
    result["kept / default, images_per_s"] = statistics.median(k["images_per_s"] / d["images_per_s"] for k, d in pairs)
    print(json.dumps(result, indent=2))
    write_json(options.out, result)


if __name__ == "__main__":
    main()
