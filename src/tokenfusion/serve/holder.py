"""The classifier in use, and how another takes its place while requests go on."""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenfusion.serve.measure import LOADED
from tokenfusion.serve.served import Served, open_served
from tokenfusion.serve.settings import Settings
from tokenfusion_runtime.errors import InputError

SECONDS_BETWEEN_LOOKS = 1.0
"""How often a worker looks whether its folder is another one now."""


class Holder:
    """Gives each request the classifier that is in use when it comes; those that are under way keep theirs.

    Args:
        settings: what to load.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.identity = settings, identity_of(settings.path)
        self.served = open_served(settings)
        self.loading = asyncio.Lock()

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
        """Load what the settings name now; where that cannot be done, say why and go on with what is in use."""
        async with self.loading:
            self.identity = identity_of(self.settings.path)
            try:
                served = await asyncio.to_thread(open_served, self.settings)
            except Exception as error:  # an engine, or a folder half written, may raise anything
                LOADED.labels("failed").inc()
                said = error if isinstance(error, InputError | OSError) else f"{type(error).__name__}: {error}"
                print(f"not loaded again, the classifier before it goes on: {said}", file=sys.stderr, flush=True)
                return
            before, self.served = self.served, served
            if not before.users:
                before.close()
            LOADED.labels("loaded").inc()

    async def watch(self) -> None:
        """Load again at each SIGHUP, and whenever the folder under the same name is another one."""
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
        while True:
            try:
                await asyncio.wait_for(asked.wait(), SECONDS_BETWEEN_LOOKS)
            except TimeoutError:
                if identity_of(self.settings.path) == self.identity:
                    continue
            asked.clear()
            await self.reload()


def identity_of(path: str) -> tuple[int, ...]:
    """What tells one exported folder or run from another that takes its place; () while there is none."""
    try:
        status = os.stat(Path(path) / "model.json")
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns
