"""What the benchmarks share: a description of where they ran, timing in turns, and work that goes on where it was."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from tokenfusion import training
from tokenfusion.errors import InputError
from tokenfusion.files import write_json
from tokenfusion.hardware import default_device, hardware_name, has_bf16
from tokenfusion.layers.fast import onednn_linear
from tokenfusion.recipe import Recipe, load_recipe


def environment() -> dict[str, Any]:
    """Command, hardware and versions, for the head of a result."""
    packages = ("torch", "torchvision", "timm", "pillow", "pyarrow")
    return {
        "command": "python " + " ".join(Path(word).name if word.startswith(("/", "..")) else word for word in sys.argv),
        "hardware": hardware_name(default_device()),
        "threads": torch.get_num_threads(),
        "load_average_before": [round(value, 2) for value in os.getloadavg()],
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def time_in_turns(
    ways: dict[str, Callable[[], Any]],
    repetitions: int,
    seconds: float = 0.2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of a call of each way; the ways take turns, so that a drifting machine favours none.

    Args:
        ways: name to a call.
        repetitions: turns.
        seconds: how long a turn lasts at least.
        clock: `time.process_time` for processor time, which other work on the machine changes little.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    for _ in range(repetitions):
        for name, call in ways.items():
            calls, start = 0, clock()
            while (passed := clock() - start) < seconds:
                call()
                calls += 1
            times[name].append(1000 * passed / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_flops(repetitions: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Floating-point operations per second of the fastest product of two square matrices, by the CPU's precisions.

    Of both libraries: PyTorch takes MKL for products in float32, which is slower than oneDNN on some CPUs.
    """
    peaks = {}
    kinds = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if has_bf16(torch.device("cpu")) else {})
    for precision, dtype in kinds.items():
        calls: dict[str, Callable[[], Any]] = {}
        for size in (1024, 2048):
            one = torch.randn(size, size).to(dtype)
            calls[f"{size} as PyTorch does"] = partial(torch.mm, one, one)
            calls[f"{size} by oneDNN"] = partial(onednn_linear, one, one, None)
        with torch.inference_mode():
            times = time_in_turns(calls, repetitions, clock=clock)
        peaks[precision] = max(2 * int(way.split()[0]) ** 3 / (ms / 1000) for way, ms in times.items())
    return peaks


def cell_options(description: str | None, models: Iterable[str], cells: Iterable[str]) -> argparse.ArgumentParser:
    """Options of a benchmark that measures models in cells, one after the other."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, or to go on with")
    parser.add_argument("--only", nargs="+", default=list(models), choices=list(models), help="models")
    parser.add_argument("--cells", nargs="+", default=list(cells), choices=list(cells))
    parser.add_argument("--repetitions", type=int, default=5, help="turns")
    parser.add_argument("--minutes", type=float, default=12.0, help="no further cell is begun after so many")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    return parser


def result_so_far(path: Path, again: bool, clock: str = "perf_counter") -> dict[str, Any]:
    """What was measured before, if on the same kind of machine; else a head without rows."""
    head = {**environment(), "clock": clock, "results": []}
    if again or not path.exists():
        return head
    before: dict[str, Any] = json.loads(path.read_text())
    for key in ("hardware", "clock", "threads", "versions"):
        if before[key] != head[key]:
            raise InputError(f"{path} has {key}={before[key]}, not {head[key]}; give --again, or another --out")
    return before


def measure_cells(
    result: dict[str, Any],
    cells: Iterable[tuple[str, str]],
    measure: Callable[[str, str], dict[str, Any]],
    options: argparse.Namespace,
) -> None:
    """Add the cells that a result lacks, and write it after each, until `--minutes` are over.

    Args:
        result: as `result_so_far` gives it.
        cells: a model and its cell, in the order in which they are measured.
        measure: gives a cell's row.
        options: as `cell_options` parses them.
    """
    start, done = time.monotonic(), {(row["model"], row["cell"]) for row in result["results"]}
    for name, key in cells:
        if (name, key) in done:
            continue
        if time.monotonic() - start > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over before {name} {key}; the same command goes on")
            return
        result["results"].append(measure(name, key))
        print(result["results"][-1], flush=True)
        write_json(options.out, result)


def with_backward(call: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """A call and its backward pass, the output standing in for its gradient."""
    output = call(*inputs)
    output.backward(output.detach())


def train_on(recipe: Recipe, run: Path, console: Console) -> None:
    """Train a run, or go on with it, if it was begun by the same recipe."""
    if not (run / "recipe.toml").exists():
        training.start(recipe, run, console)
        return
    begun = Recipe(**load_recipe(run / "recipe.toml"))
    if replace(begun, data="") != replace(recipe, data=""):
        changed = [name for name, value in asdict(recipe).items() if name != "data" and asdict(begun)[name] != value]
        raise InputError(f"{run} was begun with another {', '.join(changed)}; give the same again, or another --runs")
    training.resume(run, console)
