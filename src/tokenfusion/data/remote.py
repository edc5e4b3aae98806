"""Files behind URLs: looked up by fsspec, fetched whole into a folder of bounded size. Every wait has a limit."""

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tokenfusion.errors import InputError

WAITS: tuple[float, ...] = (1, 2, 4, 8, 16, 32)
"""Seconds between one try and the next."""
STALL_SECONDS = 60.0
"""Longest time for which a transfer may stand still before it counts as failed."""
MAX_FILES = 100_000
"""Most files that a pattern may stand for."""
THREADS = 8
PREFETCH_THREADS = 4

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """A file as it was when it was looked up."""

    url: str
    """A URL, or a path on this machine."""
    name: str
    """Relative to the folder that the data was given as."""
    size: int
    """In bytes."""
    version: str
    """What else changes with its content: an ETag, or the time it was written."""
    local: bool
    """Whether `url` is a path on this machine."""

    @property
    def key(self) -> str:
        """What the file is called in a cache: hexadecimal digits, whatever its URL holds."""
        return hashlib.blake2b(repr((self.url, self.size, self.version)).encode(), digest_size=16).hexdigest()

    @property
    def shown(self) -> str:
        return without_secrets(self.url)


def without_secrets(url: str) -> str:
    """A URL as it may be shown: user, password and signature left out."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def find_files(data: str, endings: tuple[str, ...], below: list[str] | None = None) -> list[RemoteFile]:
    """Look up the files of a pattern, a folder or a single URL.

    Args:
        data: a pattern in a shell's braces, `s3://bucket/train-{000000..000146}.tar`, a folder, or one file; each a URL
            of any kind that fsspec knows, or a path on this machine.
        endings: how the files' names end; what else lies in a folder is left alone.
        below: names of all files below a folder on this machine, where they are known.

    Returns:
        The files in the pattern's order; those of a folder, and of the folders in it, by name.

    Raises:
        InputError: a file is missing or cannot be reached, or there is none.
    """
    if "{" in data:
        root, urls = data[: data.index("{")].rpartition("/")[0], expand(data)
    elif has_ending(data, endings):
        root, urls = data.rpartition("/")[0], [data]
    else:
        root = data.rstrip("/")
        urls = list_folder(data, endings) if below is None else [f"{root}/{name}" for name in below]
    if not urls:
        raise InputError(f"{without_secrets(data)}: there is no file called *{' or *'.join(endings)} in it")
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda url: look_up(url, root), urls))


def has_ending(url: str, endings: tuple[str, ...]) -> bool:
    """Whether a path, or a URL without the signature behind it, ends so, in small or capital letters."""
    return (urlsplit(url).path if "://" in url else url).lower().endswith(endings)


def expand(pattern: str) -> list[str]:
    """The URLs that a pattern in braces stands for, each once."""
    from braceexpand import braceexpand

    try:
        urls = list(dict.fromkeys(islice(braceexpand(pattern, escape=False), MAX_FILES + 1)))
    except ValueError as error:
        raise InputError(f"{pattern}: its braces do not match; write name-{{000..146}}.tar") from error
    if len(urls) > MAX_FILES:
        raise InputError(f"{pattern} stands for more than {MAX_FILES:,} files; give a narrower range")
    return urls


def list_folder(folder: str, endings: tuple[str, ...]) -> list[str]:
    def find() -> list[str]:
        system, path = file_system(folder)
        files = [name for name in system.find(path, maxdepth=2) if has_ending(name, endings)]
        return sorted(str(system.unstrip_protocol(name)) for name in files if "/." not in name)

    return persistently(find, folder)


def look_up(url: str, root: str) -> RemoteFile:
    """What is known of a file before it is fetched."""

    from fsspec.core import strip_protocol

    def ask() -> RemoteFile:
        system, path = file_system(url)
        info = system.info(path)
        if info["type"] != "file" or info["size"] is None:
            raise InputError(f"{without_secrets(url)}: it is no file, or its server does not tell its size")
        marks = [
            info.get(name) for name in ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "Last-Modified", "mtime")
        ]
        local = "file" in system.protocol
        name = path.removeprefix(strip_protocol(root)).partition("?")[0].lstrip("/")
        version = str(next((mark for mark in marks if mark), ""))
        return RemoteFile(path if local else url, name, int(info["size"]), version, local)

    return persistently(ask, url)


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it, asked for anew each time: none outlives a fork."""
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # its own limit of five minutes is for a whole file, however large
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS),
            "trust_env": True,
        }
    system, path = fsspec.core.url_to_fs(url, **options)
    return system, path


def read_small(url: str, limit: int) -> bytes | None:
    """The bytes of a small file; None where there is none.

    Raises:
        InputError: it has more than `limit` bytes, or cannot be reached.
    """

    def ask() -> bytes | None:
        system, path = file_system(url)
        try:
            size = system.info(path)["size"]
            if size is not None and size > limit:
                raise InputError(f"{without_secrets(url)} has {size} bytes, more than {limit}; shorten it")
            return system.cat_file(path)
        except FileNotFoundError as error:
            if is_missing(error):
                return None
            raise

    return persistently(ask, url)


def download(file: RemoteFile, path: Path) -> None:
    """Fetch a file whole.

    Raises:
        InputError: it is gone, has changed, or cannot be reached for longer than is put up with.
    """

    def fetch() -> None:
        fresh = path.with_name(f"{path.name}.fresh")
        fresh.touch()
        os.replace(fresh, path)  # a try that was given up may still write; this is not its file
        system, source = file_system(file.url)
        system.get_file(source, str(path))
        if (size := path.stat().st_size) != file.size:
            raise OSError(f"{size} bytes came, of {file.size}: it was cut short, or changed since it was looked up")

    persistently(fetch, file.url, progress=lambda: path.stat().st_size if path.exists() else -1)


def persistently(action: Callable[[], Result], url: str, progress: Callable[[], object] = lambda: None) -> Result:
    """Do something with a URL, again after a while where it fails.

    Args:
        action: what to do.
        url: for messages.
        progress: what changes for as long as the action gets on.

    Raises:
        InputError: there is no such file, or no library for such URLs, or it failed too often.
    """
    shown = without_secrets(url)
    for wait in (*WAITS, None):
        try:
            return limited(action, progress)
        except InputError:
            raise
        except (ImportError, ValueError) as error:
            raise InputError(
                f"{shown}: {error}; install the library for such URLs (s3fs, gcsfs, aiohttp), or mend the URL"
            ) from error
        except Exception as error:  # every file system raises what its own library does
            if is_missing(error):
                raise InputError(f"{shown}: there is no such file; put it back, or give another pattern") from error
            if isinstance(error, PermissionError) or getattr(error, "errno", None) in (ENOSPC, EDQUOT):
                raise InputError(
                    f"{shown}: {reason(error)}; it needs the right to read it, and room to keep it"
                ) from error
            if wait is None:
                raise InputError(
                    f"{shown}: failed {len(WAITS) + 1} times within {sum(WAITS):g} s, at last with "
                    f"{reason(error)}; check the network and the access rights"
                ) from error
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def limited(action: Callable[[], Result], progress: Callable[[], object]) -> Result:
    """The result of an action; TimeoutError once its progress stands still for STALL_SECONDS, whatever it waits for."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while True:
        before = progress()
        try:
            return future.result(STALL_SECONDS)
        except TimeoutError:
            if not future.done() and progress() == before:
                raise TimeoutError(f"nothing coming for {STALL_SECONDS:g} s") from None
            if future.done():
                return future.result()


def is_missing(error: BaseException) -> bool:
    """Whether a server said that there is no such file; fsspec's HTTP says so of any failure, and why as its cause."""
    cause = error.__cause__
    return isinstance(error, FileNotFoundError) and (cause is None or getattr(cause, "status", None) in (404, 410))


def reason(error: BaseException) -> str:
    """An error in one line; of one that only says that a look-up failed, what failed."""
    error = error.__cause__ or error if isinstance(error, FileNotFoundError) else error
    return f"{type(error).__name__}: {error}".strip(": ").replace("\n", " ")


class Prefetcher:
    """Fetches what is wanted soon in a few threads, which end with the process whatever they wait for.

    Args:
        fetch: called with what is wanted; what goes wrong is left to be met again by whoever needs it.
    """

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self.fetch = fetch
        self.wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []

    def want(self, number: int) -> None:
        if not self.threads:
            self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(PREFETCH_THREADS)]
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
