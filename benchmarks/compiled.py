"""What `--compile` brings: images per second compiled and not, in turns, and the seconds before the first answer.

    python benchmarks/compiled.py --out benchmarks/results/compiled.json
    python benchmarks/compiled.py --out some.json --only cmt_micro --cells train-b64

Each cell is measured in a process of its own, whose compiler finds nothing from before (`first`), and its start once
more in another that finds what the first left on disk (`again`). What the JSON has is kept, so that a run that
`--minutes` ended goes on where it was; `--again` measures anew.
"""

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from common import cell_options, measure_cells, result_so_far, time_in_turns
from papers import inferrer, learner
from tokenfusion.compiled import compiled
from tokenfusion.hardware import as_placed, autocast, default_device, keep_freed_memory, resolve_precision
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


CLASSES = 64
"""As many as a batch has images: each gets another label."""


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
    model = as_placed(create_model(name, num_classes=CLASSES), device)
    precision = resolve_precision("auto", device)
    images = torch.randn(cell.batch, *default_config(model)["input_size"], device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    act: Callable[..., Any] = learner if cell.what == "training step" else inferrer
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


def difference(model: nn.Module, network: nn.Module, precision: Any, images: Any) -> float:
    """How far logits are apart at most, over the largest one."""
    with torch.inference_mode(), autocast(images.device, precision):
        one, other = (called.eval()(images).float() for called in (model, network))
    return ((one - other).abs().max() / one.abs().max()).item()


def main() -> None:
    options = cell_options(__doc__, MODELS, CELLS).parse_args()
    cells = [(name, key) for name in options.only for key in options.cells]
    result = result_so_far(options.out, options.again)
    measure_cells(result, cells, lambda name, key: measure(name, key, options.repetitions), options)


if __name__ == "__main__":
    main()
