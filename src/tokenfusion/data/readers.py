"""How the bytes of an image file are read."""

import os
import stat
from pathlib import Path

from tokenfusion.data.decode import UnreadableImage

MAX_FILE_BYTES = 2**30
"""Largest image file that is read into memory at all."""


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
