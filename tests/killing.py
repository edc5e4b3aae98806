"""How a process that trains kills itself by SIGKILL: after some time, or in the middle of a write."""

import itertools
import os
import random
import signal
import stat
import threading
import time
from collections.abc import Iterator

Death = tuple[str, float]
"""`time` and its seconds, or how far the write is and its number."""
WRITES = ("half written", "not flushed", "not renamed", "renamed")
"""How far a write may be when its process dies."""


def die_after(seconds: float) -> None:
    """Be killed wherever this process is once it has computed for so long, however busy the machine is."""
    end = time.process_time() + seconds

    def watch() -> None:
        while time.process_time() < end:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def die_in_a_write(moment: str, number: int) -> None:
    """Be killed in the middle of a write, counted from 1 and whatever its file."""
    fsync, replace, writes = os.fsync, os.replace, itertools.count(1)

    def flush(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and next(writes) == number:
            if moment == "half written":
                os.truncate(f"/proc/self/fd/{descriptor}", os.fstat(descriptor).st_size // 2)
            if moment in ("half written", "not flushed"):
                signal.raise_signal(signal.SIGKILL)
            os.replace = rename
        fsync(descriptor)

    def rename(source, target) -> None:
        if moment == "renamed":
            replace(source, target)
        signal.raise_signal(signal.SIGKILL)

    os.fsync = flush


def die_by(death: Death) -> None:
    kind, when = death
    if kind == "time":
        die_after(when)
    else:
        die_in_a_write(kind, int(when))


def deaths(seed: int, seconds: float) -> Iterator[Death]:
    """Random deaths without end, in turn within so many seconds and in one of the next writes."""
    chance = random.Random(seed)
    for kind in itertools.cycle(WRITES):
        yield "time", chance.uniform(0, seconds)
        yield kind, chance.randint(1, 8)
