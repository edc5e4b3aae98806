"""A folder of files that are made when they are wanted, of bounded size, shared by the processes of a machine."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tokenfusion.errors import InputError

LOCK_SECONDS = 540.0
"""Longest time that is waited for another process to make a file, or for room in the cache."""


@dataclass(frozen=True)
class Cache:
    """Files that are made when they are asked for, kept while there is room; the processes of a machine share them."""

    folder: Path
    limit: int
    """Most bytes of files, those that are being made included."""

    def open(self, key: str, size: int, make: Callable[[Path], None]) -> BinaryIO:
        """Open a file, which is made first if it is not there; the one that was used longest ago makes room for it.

        Args:
            key: its name, without a dot.
            size: most bytes that making it takes.
            make: writes it to a path.

        Raises:
            InputError: it is larger than the cache, the disk is full or fails, or another process takes too long.
        """
        path = self.folder / key
        with suppress(OSError):
            return open_used(path)
        try:
            with self.lock(key):
                with suppress(FileNotFoundError):
                    return open_used(path)
                part = self.reserve(key, size)
                try:
                    make(part)
                    file = part.open("rb")  # before it has its name, under which it may be evicted
                    with self.lock("room"):  # whoever counts what there is shall see it under one of its names
                        os.replace(part, path)
                    return file
                finally:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(
                f"{path} could not be kept: {error}; make room, or name another folder by TOKENFUSION_CACHE"
            ) from error

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a lock that ends with its process; InputError where another holds it for too long."""
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f"{name}.lock", timeout=LOCK_SECONDS)
            lock.acquire()
        except Timeout as error:
            raise InputError(
                f"{self.folder / name}.lock is held by another process for {LOCK_SECONDS:g} s; wait for it, or end it"
            ) from error
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be written: {error}; name another folder by TOKENFUSION_CACHE"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def reserve(self, key: str, size: int) -> Path:
        """An empty file whose name holds so much of the cache; waits while others hold it."""
        give_up = time.monotonic() + LOCK_SECONDS
        while size <= self.limit and time.monotonic() < give_up:
            with self.lock("room"):
                if self.make_room(key, size):
                    part = self.folder / f"{key}.{size}.part"
                    part.touch()
                    return part
            time.sleep(0.1)
        raise InputError(
            f"{self.folder} has no room for {size / 2**30:.3g} GiB within its {self.limit / 2**30:.3g} GiB; "
            "allow more by TOKENFUSION_CACHE_GB, or pack smaller shards"
        )

    def make_room(self, key: str, size: int) -> bool:
        """Evict what was used longest ago until there is room; whether there is."""
        kept: list[tuple[float, int, str]] = []
        reserved = 0
        for entry in list(os.scandir(self.folder)):
            words = entry.name.split(".")
            if entry.is_dir() or words[-1] == "lock":
                continue
            with suppress(FileNotFoundError):
                status = entry.stat()
                if len(words) == 1:
                    kept.append((status.st_mtime, status.st_size, entry.path))
                elif words[0] == key or status.st_mtime < time.time() - LOCK_SECONDS:
                    os.unlink(entry.path)  # left by a process that was killed
                elif words[-1] == "part":
                    reserved += int(words[1])
        if reserved + size > self.limit:
            return False
        total = reserved + size + sum(bytes_ for _, bytes_, _ in kept)
        for _, bytes_, path in sorted(kept):
            if total <= self.limit:
                break
            os.unlink(path)
            total -= bytes_
        return True


def open_used(path: Path) -> BinaryIO:
    """Open a file and note that it was used now."""
    file = path.open("rb")
    with suppress(OSError):
        os.utime(path)
    return file


def default_cache() -> Cache:
    """The cache in TOKENFUSION_CACHE, by default in the user's cache folder, of TOKENFUSION_CACHE_GB, by default 50."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("TOKENFUSION_CACHE") or os.path.join(home, "tokenfusion")
    text = os.environ.get("TOKENFUSION_CACHE_GB") or "50"
    try:
        limit = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise InputError(f"TOKENFUSION_CACHE_GB={text!r} is no size; give a number of GiB, such as 50")
    return Cache(Path(folder), limit)
