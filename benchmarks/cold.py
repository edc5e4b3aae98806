"""How long a command takes from its start to its first answer, and the memory it then has.

    python benchmarks/cold.py RUN IMAGE --exports DIR ... --out benchmarks/results/cold.json

`tokenfusion predict RUN IMAGE` and `python -m tokenfusion_runtime DIR IMAGE` of each export, in turns; medians of whole
processes, whose files the machine has read before. Aims: 3 s with torch, 0.8 s and 200 MB without.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import environment
from tokenfusion.files import write_json

LAUNCH = """
import os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
print(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, status)
"""
"""A small process that starts a command: one that is started by a large one counts that one's memory as its own."""


def whole(command: list[str]) -> tuple[float, float, float]:
    """Seconds of a process from start to end, those that the processors worked, and its greatest memory in MB."""
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCH, *command], capture_output=True, text=True, check=True)
    seconds, worked, memory, status = map(float, done.stdout.split())
    assert status == 0, (command, done.stderr)
    return seconds, worked, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--exports", type=Path, nargs="+", default=[])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    result = environment()
    commands = {
        "tokenfusion predict": [sys.executable, "-m", "tokenfusion", "predict", str(given.run), str(given.image)]
    }
    for export in given.exports:
        said = json.loads((export / "model.json").read_text())
        name = f"tokenfusion_runtime, {said['format']} {said['precision']}"
        commands[name] = [sys.executable, "-m", "tokenfusion_runtime", str(export), str(given.image)]
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for turn in range(given.turns + 1):
        for name, command in commands.items():
            one = whole(command)
            if turn:  # the first reads files from the disk
                found[name].append(one)
    rows: list[dict[str, Any]] = [
        {
            "command": name,
            "seconds": statistics.median(seconds for seconds, *_ in turns),
            "fastest": min(seconds for seconds, *_ in turns),
            "slowest": max(seconds for seconds, *_ in turns),
            "processor_seconds": statistics.median(worked for _, worked, _ in turns),
            "mb": statistics.median(mb for *_, mb in turns),
        }
        for name, turns in found.items()
    ]
    model = json.loads((given.run / "model.json").read_text())["name"]
    write_json(given.out, result | {"model": model, "turns": given.turns, "rows": rows})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
