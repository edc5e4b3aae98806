"""What lies in data and is no part of it: droppings of systems and tools, hidden files, files of other kinds."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tokenfusion.data.dataset import printable
from tokenfusion_runtime.walk import DROPPINGS, NO_IMAGE, why_ignored

__all__ = ["NO_IMAGE", "OUTSIDE", "describe_ignored", "is_dropping", "why_ignored"]

OUTSIDE = "in no class folder"


def is_dropping(name: str) -> bool:
    """Whether a file or folder of this name is no part of the data."""
    return name.startswith(".") or name.casefold() in DROPPINGS


def describe_ignored(files: Iterable[str] | Mapping[str, str]) -> dict[str, Any]:
    """What a Dataset tells of ignored files; one of each ending in each top folder is named, hidden ones last.

    Args:
        files: their paths, relative to the data; or a mapping from these to why each is ignored.
    """
    reasons = files if isinstance(files, Mapping) else {file: why_ignored(file) or OUTSIDE for file in files}
    ordered = sorted(map(printable, reasons), key=lambda file: is_dropping(os.path.basename(file)))
    kinds: dict[tuple[str, str], str] = {}
    for file in ordered:
        top, _, below = file.partition("/")
        kinds.setdefault((top if below else "", os.path.splitext(file)[1].lower()), file)
    return {
        "ignored": len(ordered),
        "first_ignored": tuple(kinds.values())[:3],
        "ignored_because": tuple(sorted(Counter(reasons.values()).items())),
    }
