"""JSON files: read, and refused in words where they are not as they must be."""

import json
import math
from pathlib import Path
from types import UnionType
from typing import Any, TypeAlias

from tokenfusion.errors import InputError

AGAIN = "restore it, or train and evaluate again"
"""What to do where a file of a run is damaged."""


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file; `remedy` is what to do where it is damaged.

    Raises:
        InputError: it is.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); {remedy}") from error


Shape: TypeAlias = "type | UnionType | tuple[Shape, ...] | list[Shape] | dict[str, Shape]"
"""What a value of JSON must be: a type or one of several, a list of so many, a list of any length, or an object by its
fields, of which `name?` may be missing, and `*` stands for all others."""
NUMBER = int | float
SHARE = NUMBER | None
"""None where it is one of nothing."""


def fault_in(value: Any, shape: Shape, name: str = "it") -> str:
    """What is wrong with a value of JSON, by the first place where it is not as it must be; "" where nothing is."""
    parts: list[tuple[Any, Shape, str]] = []
    if isinstance(shape, dict):
        right = isinstance(value, dict)
        fields = {key.rstrip("?"): inner for key, inner in shape.items()}
        for key in (key for key in shape if right and key[-1] not in "?*" and key not in value):
            return f"{name} lacks {key}"
        known = [(key, fields.get(key, fields.get("*"))) for key in value] if right else []
        parts = [(value[key], inner, f"{key} of {name}") for key, inner in known if inner is not None]
    elif isinstance(shape, list | tuple):
        right = isinstance(value, list) and (isinstance(shape, list) or len(value) == len(shape))
        shapes = shape * len(value) if isinstance(shape, list) and right else shape
        parts = [(one, inner, f"a part of {name}") for one, inner in zip(value, shapes, strict=True)] if right else []
    else:
        right = isinstance(value, shape) and (not isinstance(value, bool) or shape is bool)
        right = right and not (isinstance(value, float) and not math.isfinite(value))
    if not right:
        return f"{name} is {value!s:.40}"
    return next((fault for part in parts if (fault := fault_in(*part))), "")


def read_json_lines(path: Path) -> list[Any]:
    """Read a file of a JSON value a line, such as a run's `metrics.jsonl`.

    Raises:
        InputError: it is gone, or a line is damaged.
    """
    values = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; train again") from error
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is not JSON ({error}); remove the line, or train again") from error
    return values


def require(value: Any, keys: tuple[str, ...], path: Path) -> None:
    """Refuse a file that lacks some of its fields."""
    missing = [key for key in keys if not isinstance(value, dict) or key not in value]
    if missing:
        raise InputError(f"{path} is incomplete: it lacks {', '.join(missing)}; {AGAIN}")


def require_shape(value: Any, shape: dict[str, Shape], path: Path) -> None:
    """Refuse a file that lacks some of its fields, or holds what cannot stand there.

    Raises:
        InputError: it does.
    """
    require(value, tuple(key for key in shape if key[-1] not in "?*"), path)
    if fault := fault_in(value, shape):
        raise damaged(path, fault)


def damaged(path: Path, reason: str) -> InputError:
    """What to raise of a file that cannot be as it was written."""
    return InputError(f"{path} is damaged: {reason}; restore it, or make it anew")
