"""Runs in processes of their own, several at once, that outlive neither a Ctrl-C nor each other's crash."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

POLL = 0.2  # seconds between looks at the processes


@dataclass(frozen=True)
class Job:
    """Commands of `tokenfusion` to be run one after the other, as long as they succeed.

    Attributes:
        key: name and seed of what is run.
        commands: each without the leading `tokenfusion`.
        log: file for all that they print.
    """

    key: tuple[str, int]
    commands: tuple[tuple[str, ...], ...]
    log: Path


RUN_COMMANDS = """
import json, sys
from tokenfusion import cli
for words in json.loads(sys.argv[1]):
    sys.argv = ["tokenfusion", *words]
    cli.main()
"""


class Child:
    """A job under way, in a process of its own.

    Args:
        job: what to run.
        threads: for its products.
        lock: descriptor that it holds open while it lives, see `hold`.
    """

    def __init__(self, job: Job, threads: int, lock: int) -> None:
        self.job = job
        with job.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUN_COMMANDS, json.dumps(job.commands)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
                pass_fds=[lock],
                process_group=0,  # Ctrl-C reaches it once, from us, and not a second time from the terminal
            )

    def fault(self) -> str:
        """Why an ended job failed: its own word, or else the signal or the last line; "" where it did not."""
        status = self.process.returncode
        if status == 0:
            return ""
        lines = [line.strip() for line in self.job.log.read_text(errors="replace").splitlines() if line.strip()]
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if said:
            return said[-1]
        if status < 0:
            return f"killed by {signal.Signals(-status).name}" + " (out of memory?)" * (-status == signal.SIGKILL)
        return lines[-1] if lines else f"exit status {status}"


def run_jobs(
    jobs: Sequence[Job],
    at_once: int,
    threads: int,
    lock: int,
    ended: Callable[[Job, str], None],
    tick: Callable[[], None],
) -> None:
    """Run jobs, several at once; a job that fails leaves the others going.

    Whatever ends this early, as Ctrl-C does, first tells the runs under way to stop and waits until they are saved; a
    second Ctrl-C kills them.

    Args:
        jobs: in the order in which they start.
        at_once: how many run at the same time.
        threads: of each.
        lock: descriptor that they hold open, see `hold`.
        ended: called with a job that has ended and why it failed, "" where it did not.
        tick: called several times a second.
    """
    waiting = deque(jobs)
    active: list[Child] = []
    try:
        while waiting or active:
            while waiting and len(active) < at_once:
                active.append(Child(waiting.popleft(), threads, lock))
            for child in [child for child in active if child.process.poll() is not None]:
                active.remove(child)
                ended(child.job, child.fault())
            tick()
            time.sleep(POLL)
    finally:
        stop(active)


def stop(active: Sequence[Child]) -> None:
    """Let runs save themselves and end."""
    try:
        for child in active:
            child.process.send_signal(signal.SIGINT)
        for child in active:
            child.process.wait()
    except KeyboardInterrupt:
        for child in active:
            child.process.kill()
        raise


@contextmanager
def hold(folder: Path, console: Console) -> Iterator[int]:
    """Have a folder to ourselves; wait for a comparison, or a run that outlived a killed one, that is at work there.

    Yields:
        a descriptor; the folder is held until every process that has it open has ended.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"{folder}: a run is still going there; waiting for its end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
