"""What is one for the whole process stands aside while images are decoded: Pillow's limit, and what libraries say."""

import ctypes
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import cast

from PIL import Image

NOT_FOR_USERS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
"""A filter of Pillow's warnings, as of a TIFF's tags: what matters of a damaged file is said by us. So it is with what
Pillow logs, and with what libjpeg and libtiff print."""
logging.getLogger("PIL").addHandler(logging.NullHandler())

PRINTED = ctypes.create_string_buffer(2**16)
"""What C libraries print while images are decoded; what goes beyond is lost."""


def c_stderr() -> tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.CDLL | None]:
    """The variable `stderr` of C's library, a stream into memory and that library; nowhere where there are none."""
    with suppress(OSError, TypeError, ValueError, AttributeError):
        library = ctypes.CDLL(None)
        library.fmemopen.restype, library.ftell.restype = ctypes.c_void_p, ctypes.c_long
        stderr = ctypes.c_void_p.in_dll(library, "stderr")
        into_memory = ctypes.c_void_p(library.fmemopen(PRINTED, len(PRINTED), b"w"))
        library.setvbuf(into_memory, None, 2, 0)  # unbuffered (_IONBF)
        return stderr, into_memory, library
    return ctypes.c_void_p(), ctypes.c_void_p(), None


C_STDERR, INTO_MEMORY, C_LIBRARY = c_stderr()
TO_USERS = C_STDERR.value
lifted_lock = threading.Lock()
lifted = 0
printed_before = 0
"""Bytes that were printed before those in memory."""


def forget_threads() -> None:
    """In a child of fork no other thread goes on, and what they held would be waited for forever."""
    global lifted_lock, lifted
    lifted_lock, lifted = threading.Lock(), 0
    C_STDERR.value = TO_USERS


os.register_at_fork(after_in_child=forget_threads)
pillow_limit: int | None = None


@contextmanager
def decoding() -> Iterator[None]:
    """While images are decoded, what is one for the whole process stands aside: Pillow's own limit, for `max_pixels`
    guards us, its warnings, and what C libraries print; Python's standard error and file descriptor 2 stay as they are.

    Counted, for threads decode at the same time; whoever leaves last puts all back.
    """
    global lifted, pillow_limit
    with lifted_lock:
        if lifted == 0:
            pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            C_STDERR.value = INTO_MEMORY.value
            make_room(len(PRINTED) // 2)
        if NOT_FOR_USERS not in warnings.filters:
            warnings.filterwarnings("ignore", module=NOT_FOR_USERS[3].pattern)
        lifted += 1
    try:
        yield
    finally:
        with lifted_lock:
            lifted -= 1
            if lifted == 0:
                Image.MAX_IMAGE_PIXELS, C_STDERR.value = pillow_limit, TO_USERS
                with suppress(ValueError):
                    cast("list[object]", warnings.filters).remove(NOT_FOR_USERS)


def in_memory() -> int:
    """Bytes that were printed since there was last made room."""
    return int(C_LIBRARY.ftell(INTO_MEMORY)) if C_LIBRARY else 0


def make_room(most: int) -> None:
    """Forget what was printed where it is more than so many bytes; while nobody decodes."""
    global printed_before
    if C_LIBRARY and (size := in_memory()) > most:
        printed_before += size
        C_LIBRARY.rewind(INTO_MEMORY)


def printed() -> int:
    """Bytes that C libraries have printed so far while images were decoded."""
    return printed_before + in_memory()


def printed_after(start: int) -> str | None:
    """What C libraries have printed since it was `start` bytes; None where some of it is forgotten already."""
    if start < printed_before:
        return None
    end, start = in_memory(), start - printed_before
    return PRINTED.raw[start:end].decode(errors="replace") if start < end else ""


def printed_by(decode: Callable[[], object]) -> str:
    """What C libraries print while `decode` runs, and no other thread decodes."""
    with lifted_lock:
        make_room(0 if lifted == 0 else len(PRINTED))
    start = in_memory()
    decode()
    return PRINTED.raw[start : in_memory()].decode(errors="replace")
