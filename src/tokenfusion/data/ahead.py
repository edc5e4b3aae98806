"""Shards are fetched beside the training, before the first of their images is wanted."""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress

from tokenfusion.errors import InputError

THREADS = 4


class Ahead:
    """Does what is wanted soon in a few threads, which end with the process whatever they wait for.

    Args:
        fetch: called with what is wanted; what goes wrong is left to be met again by whoever needs it.
    """

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self.fetch = fetch
        self.wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []

    def want(self, number: int) -> None:
        if not self.threads:
            self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(THREADS)]
            for thread in self.threads:
                thread.start()
        self.wanted.put(number)

    def work(self) -> None:
        while (number := self.wanted.get()) is not None:
            with suppress(InputError):
                self.fetch(number)

    def close(self) -> None:
        """Drop what is not begun, and let the threads end."""
        with suppress(queue.Empty):
            while True:
                self.wanted.get_nowait()
        for _ in self.threads:
            self.wanted.put(None)
        self.threads = []
