"""What kind of data a place holds, as its name tells, and where places lie."""

import os
from enum import Enum
from pathlib import Path

from tokenfusion.errors import InputError
from tokenfusion.places import names_shards
from tokenfusion_runtime.walk import walk

LIST_ENDINGS = (".csv", ".tsv", ".tab", ".txt", ".lst", ".jsonl", ".ndjson", ".json")
TAR_ENDINGS = (".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.lzma", ".tgz", ".tbz2", ".tbz", ".txz")
"""Of plain and compressed tars, in small letters."""


class Kind(Enum):
    """What a place is opened as: the endings of such files' names, or what it is told by."""

    DIGITS = "the name digits"
    SHARDS = "a URL, or a pattern in braces"
    FOLDER = "a folder"
    PARQUET = (".parquet",)
    LIST = LIST_ENDINGS
    TAR = TAR_ENDINGS


def kind_of(place: str) -> Kind | None:
    """The kind of data that a place holds; None where its name tells of none."""
    if place == "digits":
        return Kind.DIGITS
    if names_shards(place):
        return Kind.SHARDS
    if os.path.isdir(place):
        return Kind.FOLDER
    return next((kind for kind in (Kind.PARQUET, Kind.LIST, Kind.TAR) if place.lower().endswith(kind.value)), None)


def files_below(root: Path) -> tuple[list[str], list[str]]:
    """As `walk`.

    Raises:
        InputError: a folder cannot be read.
    """
    try:
        return walk(root)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error


def is_path(data: str) -> bool:
    """Whether DATA is a file or folder that exists; `digits` is the built-in data even beside a folder of that name."""
    return data != "digits" and os.path.exists(data)


def resolved(data: str) -> str:
    """DATA named so that it means the same from any folder."""
    if "{" in data and "://" not in data:
        return os.path.abspath(data)
    return str(Path(data).resolve()) if is_path(data) else data


def require_place(data: str, remedy: str) -> None:
    """Refuse images of a run that are not where they were, InputError; `remedy` says where they are now."""
    if data != "digits" and not names_shards(data) and not os.path.exists(data):
        raise InputError(f"{data}: no such file or folder; where the images have moved, say so by `{remedy}`")
