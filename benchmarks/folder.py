"""What a folder of photographs costs from files to a report, as a user types it, and how good the classifier is.

    python benchmarks/folder.py imagenette-224.tar --pretrained CNN_FILE VIT_FILE --runs runs/folder \
        --out benchmarks/results/folder.json

`train`, `evaluate` and `report` are processes of their own, one after the other: seconds by the clock, and the most
memory that each held, mapped files included; features are not kept from before, weights are at hand. Both flatter:
the photographs are small JPEGs of 224×224 pixels, and Imagenette's, on most of which the CNN's weights were trained.
"""

import argparse
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import environment
from tokenfusion.files import write_json
from tokenfusion.json_files import read_json

CASES: tuple[tuple[int, tuple[str, ...]], ...] = ((600, ()), (5_000, ("--img-size", "112")), (5_000, ()))
"""Photographs, and options besides those of the front page."""


def some_of(source: Path, folder: Path, count: int) -> Path:
    """As many of the tar's photographs, of each class as many and four fifths to train on, as a folder."""
    shares = {"train": count * 4 // 50, "val": count // 50}
    taken: Counter[str] = Counter()
    with tarfile.open(source) as tar:
        for member in tar:
            place = Path(member.name)
            if member.isfile() and taken[str(place.parent)] < shares[place.parent.parent.name]:
                taken[str(place.parent)] += 1
                tar.extract(member, folder, filter="data")
    return folder


def run(words: list[str], cache: str) -> tuple[float, float]:
    """Seconds and MB of a command.

    Raises:
        SystemExit: it failed.
    """
    command, start = [sys.executable, "-m", "tokenfusion", *words], time.perf_counter()
    child = os.posix_spawn(sys.executable, command, os.environ | {"TOKENFUSION_CACHE": cache})
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"tokenfusion {' '.join(words)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def measure(source: Path, runs: Path, weights: list[str], count: int, options: tuple[str, ...]) -> dict[str, Any]:
    """A row: what each verb costs, and what the run is worth."""
    out = runs / "-".join([str(count), *options]).replace("--", "")
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        data = str(some_of(source, Path(folder) / "photos", count))
        costs = {"train": run(["train", data, "--pretrained", *weights, *options, "--out", str(out)], folder)}
        costs |= {verb: run([verb, str(out)], folder) for verb in ("evaluate", "report")}
    evaluation, times = (read_json(out / f"{name}.json", "measure again") for name in ("evaluation", "times"))
    return {
        "photographs": count,
        "options": " ".join(options),
        "seconds": {verb: seconds for verb, (seconds, _) in costs.items()},
        "peak_mb": {verb: memory for verb, (_, memory) in costs.items()},
        "stages": times,
        "held_out": evaluation["n"],
        "top1": evaluation["top1"],
        "top1_ci95": evaluation["top1_ci95"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a tar of train/CLASS/ and val/CLASS/")
    parser.add_argument("--pretrained", nargs=2, required=True, help="weights of the CNN and of the transformer")
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    given = parser.parse_args()
    result: dict[str, Any] = environment() | {"data": given.data.name, "rows": []}
    for count, options in CASES:
        result["rows"].append(measure(given.data, given.runs, given.pretrained, count, options))
        write_json(given.out, result)


if __name__ == "__main__":
    main()
