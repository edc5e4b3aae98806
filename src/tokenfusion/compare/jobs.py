"""Runs in processes of their own, several at once, that outlive neither a Ctrl-C nor each other's crash."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenfusion.compare.contenders import slug
from tokenfusion.compare.plan import Comparison
from tokenfusion.names import is_fused

POLL = 0.2  # seconds between looks at the processes
RUN_COMMANDS = """
import json, sys
from tokenfusion import cli
for words in json.loads(sys.argv[1]):
    sys.argv = ["tokenfusion", *words]
    try:
        cli.main()
    except SystemExit as end:
        if end.code and words[0] != "analyze":
            raise
"""
"""A process that runs commands of `tokenfusion` one after the other, as long as they succeed.

Where tokens cannot be told apart, as in transformers without a row of blocks, the run is whole without that analysis.
"""
ANALYSED = 1000
"""Held-out images that tell what either side of a fused model is worth, when its tokens are taken away."""


def run_all(
    comparison: Comparison,
    runs: Sequence[tuple[str, int]],
    lock: int,
    ended: Callable[[str, int, str], None],
    tick: Callable[[], None],
) -> None:
    """Train and evaluate runs, several at once; one that fails leaves the others going.

    Whatever ends this early, as Ctrl-C does, first tells the runs under way to stop and waits until they are saved; a
    second Ctrl-C kills them.

    Args:
        comparison: how many run at the same time, and what each trains by.
        runs: name and seed, in the order in which they start.
        lock: descriptor that they hold open, see `files.lock_folder`.
        ended: called with the name and seed of a run that has ended, and why it failed, "" where it did not.
        tick: called several times a second.
    """
    waiting = deque(runs)
    active: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    try:
        while waiting or active:
            while waiting and len(active) < comparison.jobs:
                key = waiting.popleft()
                active[key] = start(comparison, *key, lock)
            for key in [key for key, process in active.items() if process.poll() is not None]:
                ended(*key, fault(active.pop(key).returncode, log_of(comparison, *key)))
            tick()
            time.sleep(POLL)
    finally:
        stop(list(active.values()))


def start(comparison: Comparison, name: str, seed: int, lock: int) -> subprocess.Popen[bytes]:
    """Start a process that trains one run, or goes on with it, and evaluates it."""
    run = comparison.run(name, seed)
    train = ["train", "--resume", str(run)]
    if not (run / "recipe.toml").exists():
        own = ["--model", name, "--seed", str(seed), "--epochs", str(comparison.epochs[name]), "--out", str(run)]
        train = ["train", "--recipe", str(comparison.out / "recipe.toml"), *own]
    commands = [train, ["evaluate", str(run)]]
    if is_fused(name):
        commands.append(["analyze", "tokens", str(run), "--num-images", str(ANALYSED)])
    with log_of(comparison, name, seed).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", RUN_COMMANDS, json.dumps(commands)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": str(comparison.threads), "PYTHONUNBUFFERED": "1"},
            pass_fds=[lock],
            process_group=0,  # Ctrl-C reaches it once, from us, and not a second time from the terminal
        )


def log_of(comparison: Comparison, name: str, seed: int) -> Path:
    """The file for all that a run prints."""
    return comparison.out / "logs" / f"{slug(name)}-seed{seed}.txt"


def fault(status: int, log: Path) -> str:
    """Why an ended run failed: its own word, or else the signal or the last line; "" where it did not."""
    if status == 0:
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if said:
        return said[-1]
    if status < 0:
        return f"killed by {signal.Signals(-status).name}" + " (out of memory?)" * (-status == signal.SIGKILL)
    return lines[-1] if lines else f"exit status {status}"


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let runs save themselves and end."""
    try:
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise
