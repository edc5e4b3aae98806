"""What `--compile` brings: images per second compiled and not, in turns, and the seconds before the first answer.

    python benchmarks/compiled.py --out benchmarks/results/compiled.json
    python benchmarks/compiled.py --out some.json --only cmt_micro --cells train-b64

Each cell is measured in a process of its own, whose compiler finds nothing from before (`first`), and its start once
more in another that finds what the first left on disk (`again`). What the JSON has is kept, so that a run that
`--minutes` ended goes on where it was; `--again` measures anew.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from common import time_in_turns
from official import begun
from papers import infer, learner
from tokenfusion.classifier import as_placed
from tokenfusion.compiled import compiled
from tokenfusion.files import write_json
from tokenfusion.hardware import autocast, default_device, keep_freed_memory, resolve_precision
from tokenfusion.models import create_model, default_config
from tokenfusion.processes import in_fresh_process

MODELS = (
    "resnet_micro",
    "vit_micro",
    "crossvit_micro",
    "deepvit_micro",
    "cmt_micro",
    "tokenfusion_late_micro",
    "tokenfusion_early_micro",
    "tokenfusion_layerwise_micro",
)


class Cell(NamedTuple):
    """What is timed."""

    what: str
    batch: int


CELLS = {
    "infer-b8": Cell("inference", 8),
    "infer-b64": Cell("inference", 64),
    "train-b64": Cell("training step", 64),
}


def measure(name: str, key: str, repetitions: int) -> dict[str, Any]:
    """One model in one cell."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as cache:
        row = in_fresh_process(in_turns, name, key, repetitions, threads, cache)
        again = in_fresh_process(in_turns, name, key, 0, threads, cache)
    row["start_up_s"] = {"first": row["start_up_s"], "again": again["start_up_s"]}
    return row


def in_turns(name: str, key: str, repetitions: int, threads: int, cache: str) -> dict[str, Any]:
    """What `measure` does in another process; without repetitions only the start is timed."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    keep_freed_memory()
    cell, device = CELLS[key], default_device()
    model = as_placed(create_model(name, num_classes=10), device)
    precision = resolve_precision("auto", device)
    images = torch.randn(cell.batch, *default_config(model)["input_size"], device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    act: Callable[..., Any] = learner if cell.what == "training step" else infer_by
    plain = act(model, precision, images)
    plain()
    start = time.perf_counter()
    network = compiled(model)
    ways = {"eager": plain, "compiled": act(network, precision, images)}
    ways["compiled"]()
    row = {"model": name, "cell": key, **cell._asdict(), "precision": precision}
    row["start_up_s"] = time.perf_counter() - start
    if repetitions:
        if cell.what == "inference":
            row["difference"] = difference(model, network, precision, images)
        rates = {way: 1000 * cell.batch / ms for way, ms in time_in_turns(ways, repetitions, 0.5).items()}
        row |= {"images_per_s": rates, "ratio": rates["compiled"] / rates["eager"]}
    return row


def infer_by(model: Any, precision: str, images: Any) -> Callable[[], None]:
    return partial(infer, model.eval(), precision, images)


def difference(model: nn.Module, network: nn.Module, precision: Any, images: Any) -> float:
    """How far logits are apart at most, over the largest one."""
    with torch.inference_mode(), autocast(images.device, precision):
        one, other = (called.eval()(images).float() for called in (model, network))
    return ((one - other).abs().max() / one.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, or to go on with")
    parser.add_argument("--only", nargs="+", default=list(MODELS), help="models")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--repetitions", type=int, default=5, help="turns")
    parser.add_argument("--minutes", type=float, default=15.0, help="no further cell is begun after so many")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    options = parser.parse_args()
    start, result = time.monotonic(), begun(options.out, options.again, "perf_counter")
    done = {(row["model"], row["cell"]) for row in result["results"]}
    for name in options.only:
        for key in options.cells:
            if (name, key) in done:
                continue
            if time.monotonic() - start > 60 * options.minutes:
                print(f"{options.minutes:g} minutes are over before {name} {key}; the same command goes on")
                return
            result["results"].append(measure(name, key, options.repetitions))
            print(result["results"][-1], flush=True)
            write_json(options.out, result)


if __name__ == "__main__":
    main()
