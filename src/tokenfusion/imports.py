"""How a verb imports what takes seconds."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def first_import(package: str) -> Iterator[None]:
    """The first import of a package of thousands of modules, without Python looking for garbage meanwhile.

    What is imported stays until the process ends, and is not looked through later either, nor at the end: of a verb
    that answers in seconds that is a quarter. Nothing is done where the package has been imported before.
    """
    if package in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
