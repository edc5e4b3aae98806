"""What training in several processes costs and gains, as the command is used: paired runs of the same recipe.

    python benchmarks/distributed.py --out benchmarks/results/distributed.json

The built-in digits at 32×32 pixels, in fp32. Three ways take turns: `plain` (no launcher), `torchrun 1` (the path of
several processes on one) and `torchrun 2` (the same effective batch on two). A run's figure is the rate of its last
epoch; a result is the median of the ratios of runs in the same turn. Each process has one thread, unless told
otherwise, so that two use two cores where `plain` uses one. What a step sends is counted, not measured: in a ring of
n processes each sends 2 (n - 1) / n of the gradients' bytes; BatchNorm's statistics come on top, two vectors a layer
and direction.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import environment
from tokenfusion import create_model
from tokenfusion.files import write_json
from tokenfusion.history import read_history

WAYS = {"plain": 0, "torchrun 1": 1, "torchrun 2": 2}


def rate(processes: int, options: argparse.Namespace, run: Path) -> float:
    """Images per second in the last epoch of a run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    recipe = {"model": options.model, "img-size": 32, "batch-size": 128, "epochs": options.epochs, "precision": "fp32"}
    words = [word for name, value in recipe.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, *launcher, "-m", "tokenfusion", "train", "digits", "--out", str(run), *words]
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    subprocess.run(command, check=True, env=os.environ | threads, stdout=subprocess.DEVNULL)
    return float(read_history(run)[-1]["images_per_s"])


def sent_mb(model: str, processes: int) -> float:
    """MB of gradients that each process sends in a step."""
    weights = sum(parameter.numel() for parameter in create_model(model, num_classes=10).parameters())
    return 2 * (processes - 1) / processes * 4 * weights / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--model", default="tokenfusion_early_micro")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    options = parser.parse_args()
    head = environment()
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(options.turns):
        for name in list(WAYS) if turn % 2 == 0 else list(reversed(WAYS)):
            with tempfile.TemporaryDirectory() as folder:
                rates[name].append(rate(WAYS[name], options, Path(folder) / "run"))
            print(f"{name}: {rates[name][-1]:,.0f} images/s", flush=True)
    pairs = list(zip(*rates.values(), strict=True))
    result: dict[str, Any] = head | {
        "model": options.model,
        "batch_size": 128,
        "threads_of_each_process": options.threads,
        "overhead_on_one_process": statistics.median(plain / one for plain, one, _ in pairs) - 1,
        "speed_of_two_processes": statistics.median(two / one for _, one, two in pairs),
        "mb_sent_per_step": {str(n): sent_mb(options.model, n) for n in (2, 8, 64, 512)},
        "images_per_second": rates,
    }
    print({name: result[name] for name in ("overhead_on_one_process", "speed_of_two_processes")})
    write_json(options.out, result)


if __name__ == "__main__":
    main()
