"""What a user of a command would see of libraries' warnings."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

HIDDEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""Kinds of warnings that Python itself keeps from the user of a command."""


@contextmanager
def no_warning() -> Iterator[None]:
    """Fail where a warning was given that Python would show."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind in HIDDEN:
            warnings.simplefilter("ignore", kind)
        yield
    assert [str(warning.message) for warning in caught] == []
