"""Whether a change made anything slower or larger: two checkouts of the package take turns in processes of their own.

    python benchmarks/regression.py ../before/src src --out benchmarks/results/regression.json

Each process runs one of WORK under one checkout and prints images per second and its peak memory. The two take turns,
the order changing from turn to turn, and a row's ratio is that of the medians
(after to before; of memory before to after): 1 is no change, below 1 is worse.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from common import environment
from tokenfusion.files import write_json

INFERENCE = """
import sys, time, torch, tokenfusion
from tokenfusion.hardware import autocast, peak_memory_mb
name, size, batch, precision = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.manual_seed(0)
model = tokenfusion.create_model(name, num_classes=10, img_size=size).eval()
images = torch.randn(batch, 3, size, size)
with torch.inference_mode(), autocast(images.device, precision):
    for _ in range(3):
        model(images)
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < 3:
        model(images)
        calls += 1
print(calls * batch / passed, peak_memory_mb(images.device))
"""
TRAINING = """
import json, sys, tempfile
from pathlib import Path
from tokenfusion.cli import main
name, size, batch, precision = sys.argv[1:5]
with tempfile.TemporaryDirectory() as folder:
    run = Path(folder, "run")
    options = ["--img-size", size, "--batch-size", batch, "--precision", precision, "--epochs", sys.argv[5]]
    sys.argv = ["tokenfusion", "train", "digits", "--model", name, *options, "--out", str(run)]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
print(max(row["images_per_s"] for row in rows), rows[-1]["peak_memory_mb"])
"""
PAIR = "fuse(resnet18,vit_tiny_patch16_224,layerwise)"
WORK: list[tuple[str, str, tuple[Any, ...]]] = [
    *[
        ("inference", INFERENCE, (name, size, batch, precision))
        for name, size, batch, precision in (
            ("tokenfusion_early_tiny", 224, 8, "bf16"),
            ("tokenfusion_late_tiny", 224, 8, "bf16"),
            ("tokenfusion_layerwise_tiny", 224, 1, "bf16"),
            ("tokenfusion_layerwise_tiny", 224, 8, "fp32"),
            ("tokenfusion_layerwise_tiny", 224, 8, "bf16"),
            (PAIR, 224, 8, "bf16"),
            ("crossvit_9_dagger_224", 240, 8, "fp32"),
            ("crossvit_9_dagger_224", 240, 8, "bf16"),
            ("deepvit_16", 224, 1, "bf16"),
            ("deepvit_16", 224, 8, "fp32"),
            ("deepvit_16", 224, 8, "bf16"),
            ("cmt_ti", 160, 8, "fp32"),
            ("cmt_ti", 160, 8, "bf16"),
        )
    ],
    *[
        ("training", TRAINING, (name, 32, 64, precision, 3))
        for name, precision in (
            ("tokenfusion_early_micro", "bf16"),
            ("tokenfusion_late_micro", "bf16"),
            ("tokenfusion_layerwise_micro", "bf16"),
            ("tokenfusion_layerwise_micro", "fp32"),
            ("deepvit_micro", "bf16"),
            ("crossvit_micro", "bf16"),
            ("cmt_micro", "bf16"),
        )
    ],
]


def measure(script: str, source: Path, arguments: tuple[Any, ...]) -> tuple[float, float]:
    """Images per second and peak memory (MiB) of a workload under a checkout's `src`."""
    variables = os.environ | {"PYTHONPATH": str(source.resolve())}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{arguments} under {source}: {result.stderr.strip()[-2000:]}")
    speed, memory = result.stdout.split()[-2:]
    return float(speed), float(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="src of the checkout that is compared with")
    parser.add_argument("after", type=Path, help="src of the checkout that is judged")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="", help="workloads whose name holds this alone")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result: dict[str, Any] = environment() | {"turns": options.turns, "rows": []}
    for what, script, arguments in WORK:
        name = f"{what} {' '.join(map(str, arguments[:4]))}"
        if options.only not in name:
            continue
        found: dict[Path, list[tuple[float, float]]] = {options.before: [], options.after: []}
        for turn in range(options.turns):
            order = [options.before, options.after] if turn % 2 == 0 else [options.after, options.before]
            for source in order:
                found[source].append(measure(script, source, arguments))
        (speed, memory), (new_speed, new_memory) = (
            [median(column) for column in zip(*turns, strict=True)] for turns in found.values()
        )
        row = {
            "workload": name,
            "images_per_s": {
                "before": [s for s, _ in found[options.before]],
                "after": [s for s, _ in found[options.after]],
            },
            "memory_mb": {"before": memory, "after": new_memory},
            "speed_ratio": new_speed / speed,
            "memory_ratio": memory / new_memory,
        }
        result["rows"].append(row)
        print(f"{name}: speed {row['speed_ratio']:.3f}, memory {row['memory_ratio']:.3f}", flush=True)
        write_json(options.out, result)
    print(json.dumps({"lowest speed ratio": min(row["speed_ratio"] for row in result["rows"])}))


if __name__ == "__main__":
    main()
