"""Image files named on a command line, and their bytes."""

import glob
import io
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenfusion_runtime.errors import UnreadableImage
from tokenfusion_runtime.walk import images_below

MAX_FILE_BYTES = 2**30
"""Largest image file that is read into memory at all."""


def expand(paths: Sequence[str]) -> Iterator[str]:
    """Files named by files, folders (all images below them), globs, or - (a path a line on standard input).

    A name that stands for nothing is passed on as it is, so that it gets an entry with an error.
    """
    for path in paths:
        if path == "-":
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="surrogateescape")  # a path may be any bytes
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        elif os.path.isdir(path):
            yield from images_below(path) or [path]
        elif os.path.exists(path):
            yield path
        else:
            yield from sorted(glob.glob(path, recursive=True)) or [path]


def read_file(path: str | Path) -> bytes:
    """The bytes of an image file, or UnreadableImage with the reason."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableImage("a folder without images")
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise UnreadableImage(f"the file has {status.st_size} bytes, more than {MAX_FILE_BYTES}")
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(f"the file cannot be read: {error.strerror}") from error
    except ValueError as error:  # a name that no file can have, as with a NUL in it
        raise UnreadableImage(f"the file cannot be read: {error}") from error
