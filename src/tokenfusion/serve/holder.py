"""The classifier in use, and the token, and how others take their place while requests go on."""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenfusion.serve.measure import LOADED
from tokenfusion.serve.served import Served, open_served
from tokenfusion.serve.settings import Settings
from tokenfusion_runtime.errors import InputError

SECONDS_BETWEEN_LOOKS = 1.0
"""How often a worker looks whether its folder, or the file of its token, is another one now."""


class Holder:
    """Gives each request the classifier that is in use when it comes; those that are under way keep theirs.

    Args:
        settings: what to load.

    Attributes:
        served: the classifier in use.
        token: that requests must bring; "" for none.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.identity, self.token_identity = self.identities()
        self.served, self.token = open_served(settings), settings.read_token()
        self.loading = asyncio.Lock()

    def identities(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What tells the folder, and the token's file, from others that take their place."""
        token_file = self.settings.token_file
        return identity_of(Path(self.settings.path, "model.json")), identity_of(Path(token_file)) if token_file else ()

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
            self.identity, _ = self.identities()
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
            (folder, token), both = self.identities(), asked.is_set()
            asked.clear()
            if both or token != self.token_identity:
                self.read_token()
            if both or folder != self.identity:
                await self.reload()


def identity_of(file: Path) -> tuple[int, ...]:
    """What tells a file from another that takes its place; () while there is none."""
    try:
        status = os.stat(file)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns
