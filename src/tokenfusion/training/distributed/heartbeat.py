"""Signs of life, by which a process that waits tells one that is busy from one that is gone."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from time import monotonic

from torch._C._distributed_c10d import Store

BEAT = 2.0
"""Seconds between two signs of life."""
SILENCE = 20.0
"""Seconds without one after which a process is taken to be gone; it may be busy in Python for less."""


@contextmanager
def heartbeat(store: Store, rank: int) -> Iterator[None]:
    """Within it, a thread counts in the store for as long as this process lives, whatever else it does."""
    own, over = store.clone(), Event()  # a connection must not be used by two threads at once

    def beat() -> None:
        with suppress(RuntimeError):  # the store may end first
            while not over.is_set():
                own.add(key_of(rank), 1)
                over.wait(BEAT)

    thread = Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=BEAT)


class Pulse:
    """What is heard of some processes.

    Args:
        store: where they count.
        ranks: their numbers.
    """

    def __init__(self, store: Store, ranks: Iterable[int]) -> None:
        self.store = store
        self.heard = {rank: (0, monotonic()) for rank in ranks}  # the last count, and since when it stands still
        self.asked = -BEAT

    def silent(self) -> int | None:
        """One that had begun to count and stands still for too long."""
        now = monotonic()
        if now - self.asked < BEAT:
            return None
        self.asked = now
        for rank, (before, since) in self.heard.items():
            count = self.store.add(key_of(rank), 0)
            if count != before:
                self.heard[rank] = count, now
            elif count and now - since > SILENCE:
                return rank
        return None


def key_of(rank: int) -> str:
    return f"alive/{rank}"
