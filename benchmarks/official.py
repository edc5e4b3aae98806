"""Every family beside its official code, in turns: images per second, their ratio, and the share of the CPU's peak.

    python benchmarks/official.py --out benchmarks/results/official.json
    python benchmarks/official.py --out some.json --only cmt_s --cells b8-bf16 train-bf16

The official code is transcribed in `yardsticks.py`. Each side has a process of its own, and they take turns: `official`
with memory as glibc manages it, as that code runs by itself; `ours` after `keep_freed_memory`, as this package's
commands run it, and packed where it infers; `official, memory kept` tells how much of the ratio is that setting alone.
What the JSON has is kept, so that a run that `--minutes` ended goes on where it was; `--again` measures anew. Cells in
bf16 are for CPUs that have it. A training step counts as three times a forward pass's multiply-adds.
`--processor-time` counts the processor time of one thread instead, which other work on the machine changes little.
"""

import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import timm
import torch

from common import cell_options, measure_cells, peak_flops, result_so_far, time_in_turns
from papers import ALONE, images_of, inferrer, learner
from tokenfusion.hardware import as_dtype, keep_freed_memory
from tokenfusion.layers.packed import pack
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
SIDES = ("official", "official, memory kept", "ours")


def measure(name: str, key: str, repetitions: int, peaks: dict[str, float], clock: Clock) -> dict[str, Any]:
    """One model in one cell: images per second of all sides."""
    cell, context, sides, processes = CELLS[key], get_context("spawn"), {}, []
    for side in SIDES:
        sides[side], its_end = context.Pipe()
        arguments = (its_end, name, cell, side, torch.get_num_threads(), clock)
        processes.append(context.Process(target=take_turns, args=arguments, daemon=True))
        processes[-1].start()
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for connection in sides.values():  # each is ready before any is timed
        connection.recv()
    for _ in range(repetitions):
        for side, connection in sides.items():
            connection.send(True)
            times[side].append(connection.recv())
    for connection in sides.values():
        connection.send(False)
    for process in processes:
        process.join()
    rates = {side: 1000 * cell.batch / statistics.median(ms) for side, ms in times.items()}
    counts, _ = count_model(name)
    flops = 2 * counts.macs * (1 if cell.what == "inference" else 3)
    shares = {side: flops * rate / peaks[cell.precision] for side, rate in rates.items()}
    row = {"model": name, "cell": key, **cell._asdict(), "images_per_s": rates, "peak_flops": peaks}
    return row | {"ratio": rates["ours"] / rates["official"], "share_of_peak": shares}


def take_turns(connection: Connection, name: str, cell: Cell, side: str, threads: int, clock: Clock) -> None:
    """One side, in this process: milliseconds of a call, each time that it is asked."""
    torch.set_num_threads(threads)
    if side != "official":
        keep_freed_memory()
    model = timm.create_model(name).eval()
    images = images_of(model, cell.batch)
    if side != "ours":
        model = yardstick_of(model)
    elif cell.what == "inference":
        model = pack(model, as_dtype(cell.precision, images.device))
    act = learner if cell.what == "training step" else inferrer
    call = act(model, cell.precision, images)
    call()
    connection.send("ready")
    while connection.recv():
        connection.send(time_in_turns({side: call}, 1, 0.5, clock)[side])


def main() -> None:
    parser = cell_options(__doc__, ALONE, CELLS)
    parser.add_argument("--processor-time", action="store_true", help="of one thread, where other work cannot be ended")
    options = parser.parse_args()
    if options.processor_time:
        torch.set_num_threads(1)
    clock = time.process_time if options.processor_time else time.perf_counter
    result = result_so_far(options.out, options.again, clock.__name__)
    peaks = peak_flops(options.repetitions, clock)
    cells = [(name, key) for key in options.cells if CELLS[key].precision in peaks for name in options.only]
    measure_cells(result, cells, lambda name, key: measure(name, key, options.repetitions, peaks, clock), options)


if __name__ == "__main__":
    main()
