"""What is one for the whole process stands aside while images are decoded: Pillow's limit, and what libraries say."""

import ctypes
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import cast

from PIL import Image

NOT_FOR_USERS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
"""A filter of Pillow's warnings, as of a TIFF's tags: what matters of a damaged file is said by us. So it is with what
Pillow logs, and with what libjpeg and libtiff print."""
logging.getLogger("PIL").addHandler(logging.NullHandler())


def c_stderr() -> tuple[ctypes.c_void_p, int | None]:
    """The variable `stderr` of C's library, and a file that leads nowhere; two times nowhere where it is not found."""
    with suppress(OSError, TypeError, ValueError, AttributeError):
        library = ctypes.CDLL(None)
        library.fopen.restype = ctypes.c_void_p
        return ctypes.c_void_p.in_dll(library, "stderr"), library.fopen(os.devnull.encode(), b"we")
    return ctypes.c_void_p(), None


C_STDERR, NOWHERE = c_stderr()
HEARD = C_STDERR.value
lifted_lock = threading.Lock()
lifted = 0


def forget_threads() -> None:
    """In a child of fork no other thread goes on, and what they held would be waited for forever."""
    global lifted_lock, lifted
    lifted_lock, lifted = threading.Lock(), 0
    C_STDERR.value = HEARD


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
            C_STDERR.value = NOWHERE
        if NOT_FOR_USERS not in warnings.filters:
            warnings.filterwarnings("ignore", module=NOT_FOR_USERS[3].pattern)
        lifted += 1
    try:
        yield
    finally:
        with lifted_lock:
            lifted -= 1
            if lifted == 0:
                Image.MAX_IMAGE_PIXELS, C_STDERR.value = pillow_limit, HEARD
                with suppress(ValueError):
                    cast("list[object]", warnings.filters).remove(NOT_FOR_USERS)
