"""Every family beside its official code, in turns: images per second, their ratio, and the share of the CPU's peak.

    python benchmarks/official.py --out benchmarks/results/official.json
    python benchmarks/official.py --out some.json --only cmt_s --cells b8-bf16 train-bf16

The official code is transcribed in `yardsticks.py`. What the JSON has is kept, so that a run that `--minutes` ended
goes on where it was; `--again` measures anew. Cells in bf16 are for CPUs that have it. A training step counts as three
times a forward pass's multiply-adds. `--processor-time` counts the processor time of one thread instead, which other
work on the machine changes little.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from common import environment, peak_flops, time_in_turns
from papers import ALONE, images_of, infer, learner
from tokenfusion.errors import InputError
from tokenfusion.files import write_json
from tokenfusion.hardware import keep_freed_memory
from tokenfusion.models.cost import count_model
from yardsticks import yardstick_of

Clock = Callable[[], float]


class Cell(NamedTuple):
    """What is timed, and what is aimed at: times the official code's speed, share of the precision's peak or None."""

    what: str
    batch: int
    precision: str
    aim: float
    share_aim: float | None = None


CELLS = {
    "b1-fp32": Cell("inference", 1, "fp32", 1.3),
    "b1-bf16": Cell("inference", 1, "bf16", 1.3),
    "b8-fp32": Cell("inference", 8, "fp32", 1.3),
    "b8-bf16": Cell("inference", 8, "bf16", 1.3, 0.65),
    "train-fp32": Cell("training step", 16, "fp32", 1.5),
    "train-bf16": Cell("training step", 16, "bf16", 1.5, 0.55),
}


def measure(name: str, key: str, repetitions: int, peaks: dict[str, float], clock: Clock) -> dict[str, Any]:
    """One model in one cell: images per second of both sides."""
    cell, ours = CELLS[key], timm.create_model(name).eval()
    sides, images = {"official": yardstick_of(ours), "ours": ours}, images_of(ours, cell.batch)
    act = infer_by if cell.what == "inference" else learner
    ways = {side: act(model, cell.precision, images) for side, model in sides.items()}
    rates = {side: 1000 * cell.batch / ms for side, ms in time_in_turns(ways, repetitions, 0.5, clock).items()}
    counts, _ = count_model(name)
    flops = 2 * counts.macs * (1 if cell.what == "inference" else 3)
    shares = {side: flops * rate / peaks[cell.precision] for side, rate in rates.items()}
    row = {"model": name, "cell": key, **cell._asdict(), "images_per_s": rates}
    return row | {"ratio": rates["ours"] / rates["official"], "share_of_peak": shares, "peak_flops": peaks}


def infer_by(model: Any, precision: str, images: Any) -> Callable[[], None]:
    return partial(infer, model.eval(), precision, images)


def begun(path: Path, again: bool, clock: str) -> dict[str, Any]:
    """What was measured before, if on the same kind of machine; else a head without rows."""
    head = {**environment(), "clock": clock, "results": []}
    if again or not path.exists():
        return head
    before: dict[str, Any] = json.loads(path.read_text())
    for key in ("hardware", "clock", "threads", "versions"):
        if before[key] != head[key]:
            raise InputError(f"{path} has {key}={before[key]}, not {head[key]}; give --again, or another --out")
    return before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, or to go on with")
    parser.add_argument("--only", nargs="+", default=list(ALONE), choices=ALONE, help="models")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), help="all that the CPU has the arithmetic for")
    parser.add_argument("--repetitions", type=int, default=5, help="turns")
    parser.add_argument("--minutes", type=float, default=12.0, help="no further cell is begun after so many")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--processor-time", action="store_true", help="of one thread, where other work cannot be ended")
    options = parser.parse_args()
    if options.processor_time:
        torch.set_num_threads(1)
    clock = time.process_time if options.processor_time else time.perf_counter
    start, result = time.monotonic(), begun(options.out, options.again, clock.__name__)
    peaks = peak_flops(options.repetitions, clock)
    done = {(row["model"], row["cell"]) for row in result["results"]}
    cells = options.cells or [key for key, cell in CELLS.items() if cell.precision in peaks]
    for key in cells:  # training last: its allocator is another
        if CELLS[key].what == "training step":
            keep_freed_memory()
        for name in options.only:
            if (name, key) in done:
                continue
            if time.monotonic() - start > 60 * options.minutes:
                print(f"{options.minutes:g} minutes are over before {name} {key}; the same command goes on")
                return
            result["results"].append(measure(name, key, options.repetitions, peaks, clock))
            print(result["results"][-1], flush=True)
            write_json(options.out, result)


if __name__ == "__main__":
    main()
