"""Refuse what a JSON file holds where its fields are missing or of other types."""

from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from tokenfusion.errors import InputError
from tokenfusion.report.results import require

Kinds = Mapping[str, type | UnionType]
"""Fields, and what each is."""
NUMBER = int | float


def check(value: Any, kinds: Kinds, path: Path) -> None:
    """Refuse an object of a file that lacks some of its fields, or has one of another type.

    Raises:
        InputError: it does.
    """
    require(value, tuple(kinds), path)
    for key, kind in kinds.items():
        if not isinstance(value[key], kind):
            raise damaged(path, f"{key} is {value[key]!r:.60}")


def damaged(path: Path, reason: str) -> InputError:
    """What to raise of a file that cannot be as it was written."""
    return InputError(f"{path} is damaged: {reason}; restore it, or make it anew")
