"""The classifier in use, and the token, and how others take their place while requests go on."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenfusion.serve.measure import LOADED
from tokenfusion.serve.served import Served, open_served
from tokenfusion.serve.settings import Settings
from tokenfusion_runtime.errors import InputError

SECONDS_BETWEEN_LOOKS = 1.0
"""How often a worker looks whether its folder, or the file of its token, is another one now."""

LONGEST_PAUSE = 60.0
"""Seconds between the tries to load a folder that cannot be loaded and does not change."""

Stamps = tuple[tuple[str, int, int, int, int], ...]
"""Of each file its name, device, inode, time of change and size."""


class Holder:
    """Gives each request the classifier that is in use when it comes; those that are under way keep theirs.

    Args:
        settings: what to load.

    Attributes:
        served: the classifier in use.
        token: that requests must bring; "" for none.
        pause: seconds between the last two tries to load a folder that cannot be loaded; 0 where it could.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.identity, self.token_identity = self.identities()
        self.served, self.token = open_served(settings), settings.read_token()
        self.pause, self.next_try, self.said = 0.0, 0.0, ""

    def identities(self) -> tuple[Stamps, Stamps]:
        """What tells the folder, by its model.json and its graph or weights, and the token's file from others."""
        token_file = self.settings.token_file
        folder = stamps_of(Path(self.settings.path).glob("model.*"))
        return folder, stamps_of([Path(token_file)] if token_file else [])

    @contextmanager
    def use(self) -> Iterator[Served]:
        """The classifier in use, which stays open until the block ends though another takes its place."""
        served = self.served
        served.users += 1
        try:
            yield served
        finally:
            served.users -= 1
            if served is not self.served and not served.users:
                served.close()

    async def reload(self) -> None:
        """Load what the settings name now; where that cannot be done, say why and go on with what is in use.

        What is damaged may be half copied: it is tried again, after pauses that grow, and each reason is said once.
        """
        self.identity, _ = self.identities()
        try:
            served = await asyncio.to_thread(open_served, self.settings)
        except Exception as error:  # an engine, or a folder half written, may raise anything
            LOADED.labels("failed").inc()
            self.pause = min(LONGEST_PAUSE, 2 * self.pause or 1.0)
            self.next_try = time.monotonic() + self.pause
            before, self.said = self.said, describe_failure(error)
            if self.said != before:
                print(f"not loaded again, the classifier before it goes on: {self.said}", file=sys.stderr, flush=True)
            return
        replaced, self.served = self.served, served
        if not replaced.users:
            replaced.close()
        LOADED.labels("loaded").inc()
        self.pause, self.said = 0.0, ""

    def read_token(self) -> None:
        """Take the token that its file has now; where there is none, say why and go on with the one in use."""
        _, self.token_identity = self.identities()
        try:
            self.token = self.settings.read_token()
        except InputError as error:
            print(f"the token before it goes on: {error}", file=sys.stderr, flush=True)

    async def watch(self) -> None:
        """Load both again at each SIGHUP, and each when its folder or file under the same name is another one."""
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), SECONDS_BETWEEN_LOOKS)
            sighup = asked.is_set()
            asked.clear()
            await self.look(sighup)

    async def look(self, asked: bool = False) -> None:
        """Load what is another one now, or could not be loaded before; both where somebody asks for it."""
        folder, token = self.identities()
        if asked or token != self.token_identity:
            self.read_token()
        if asked:
            self.said = ""
        if asked or folder != self.identity or (self.pause and time.monotonic() >= self.next_try):
            await self.reload()


def stamps_of(files: Iterable[Path]) -> Stamps:
    """What tells files from others that take their place; those that there are not are left out."""
    found = []
    with suppress(OSError):  # the folder may go away meanwhile
        for file in files:
            if file.exists():
                status = os.stat(file)
                found.append((file.name, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(sorted(found))


def describe_failure(error: Exception) -> str:
    """Why nothing was loaded, in a line."""
    return str(error) if isinstance(error, InputError | OSError) else f"{type(error).__name__}: {error}"
