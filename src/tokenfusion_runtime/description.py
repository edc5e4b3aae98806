"""`model.json` of an exported folder: what it must hold, and whether the graph beside it is its own."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenfusion_runtime.errors import InputError

FORMAT = 1
"""Of exported folders; a reader refuses a newer one."""


def read_description(folder: Path) -> dict[str, Any]:
    """An exported folder's `model.json`.

    Raises:
        InputError: there is none, or it is damaged or of a newer version.
    """
    description = read_model_json(folder)
    version = description.get("export_format") if isinstance(description, dict) else None
    if type(version) is not int:
        raise InputError(f"{folder} is no exported classifier; `tokenfusion export RUN --out DIR` writes one")
    if version > FORMAT:
        raise InputError(
            f"{folder} is of export format {version}, newer than the {FORMAT} that this version reads; "
            "update tokenfusion-runtime"
        )
    if fault := fault_of(description):
        raise InputError(f"{folder / 'model.json'} {fault}; it is damaged, export again")
    return description


def read_model_json(folder: Path) -> Any:
    """What the `model.json` of an exported folder, or of a run, says, whatever that is.

    Raises:
        InputError: there is none, or it is not JSON.
    """
    path = folder / "model.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}; give the folder that `tokenfusion export --out` wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON ({error}); it is damaged, copy the folder whole or export again"
        ) from error


def fault_of(description: dict[str, Any]) -> str:
    """What is wrong with a description of this version; "" where nothing is."""
    for key, right in FIELDS.items():
        if key not in description:
            return f"lacks {key}"
        if not right(description[key]):
            return f"has {key}={description[key]!r}"[:300]
    classes, thresholds = description["classes"], description["thresholds"]
    if thresholds and len(thresholds) != len(classes):
        return f"has {len(thresholds)} thresholds for {len(classes)} classes"
    return ""


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether it is a finite number within limits."""
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, from 1 on."""
    return type(value) is int and value >= 1


def is_list(value: Any, item: Callable[[Any], bool], least: int = 0) -> bool:
    """Whether it is a list of at least so many such items."""
    return isinstance(value, list) and len(value) >= least and all(map(item, value))


def is_name(value: Any) -> bool:
    """Whether it is the name of a file in the folder itself."""
    return isinstance(value, str) and value == os.path.basename(value) and value not in ("", ".", "..")


def is_preprocess(value: Any) -> bool:
    """Whether it says how images are prepared."""
    if not isinstance(value, dict) or value.get("in_chans") not in (1, 3):
        return False
    low_high = value.get("value_range")
    return (
        is_list(value.get("img_size"), is_whole)
        and len(value["img_size"]) == 2
        and is_number(value.get("crop_pct"), 1e-6, 1)
        and value.get("interpolation") in ("bilinear", "bicubic")
        and (low_high is None or (is_list(low_high, is_number) and len(low_high) == 2))
    )


def is_errors(value: Any) -> bool:
    """Whether it is a `SurestErrors` as a dictionary."""
    if not isinstance(value, dict) or not is_whole(value.get("images")):
        return False
    ranks, scores = value.get("ranks", ()), value.get("scores", ())
    return is_list(ranks, is_whole) and is_list(scores, is_number) and len(ranks) == len(scores)


FIELDS: dict[str, Callable[[Any], bool]] = {
    "name": lambda value: isinstance(value, str),
    "classes": lambda value: is_list(value, lambda one: isinstance(one, str), 1) and len(set(value)) == len(value),
    "thresholds": lambda value: is_list(value, lambda one: is_number(one, 0, 1)),
    "preprocess": is_preprocess,
    "max_pixels": is_whole,
    "surest_errors": lambda value: is_list(value, is_errors),
    "format": lambda value: isinstance(value, str),
    "precision": lambda value: value in ("fp32", "fp16", "bf16", "int8"),
    "batch": lambda value: value is None or is_whole(value),
    "files": lambda value: is_list(value, is_name, 1),
    "graph_sha256": lambda value: isinstance(value, str),
}
"""What `model.json` must hold, and whether a value of it can be."""


def require_whole(folder: Path, description: dict[str, Any]) -> None:
    """Refuse a graph that is not the one that `model.json` was written with."""
    try:
        found = hash_of([folder / name for name in description["files"]])
    except OSError as error:
        raise InputError(f"{folder} lacks its graph: {error}; copy the folder whole, or export again") from error
    if found != description["graph_sha256"]:
        raise InputError(
            f"{folder}: model.json and {description['files'][0]} do not belong together, or the graph is damaged; copy "
            "the folder whole, or export again"
        )


DECIDING = ("classes", "preprocess", "multi_label", "thresholds", "temperature", "surest_errors", "precision")
"""What of a description decides answers: it must be as in the copy inside the graph's file."""


def require_same(folder: Path, description: dict[str, Any], inside: str) -> None:
    """Refuse a `model.json` that answers otherwise than the copy of it inside the graph's file, where there is one."""
    copy = json.loads(inside) if inside else description
    for key in DECIDING:
        if description.get(key) != copy.get(key):
            name, value, other = first_difference(key, description.get(key), copy.get(key))
            raise InputError(
                f"{folder / 'model.json'} says {name}={value!r:.100}, and its copy inside {description['files'][0]} "
                f"{other!r:.100}: one was changed after the export, and answers would be wrong; copy the folder whole, "
                "or export again"
            )


def first_difference(name: str, value: Any, other: Any) -> tuple[str, Any, Any]:
    """The first part in which two JSON values differ: its name, and what it is in either."""
    parts: Any = ()
    if isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
        parts = value
    elif isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
        parts = range(len(value))
    for part in parts:
        if value[part] != other[part]:
            return first_difference(f"{name}[{part!r}]", value[part], other[part])
    return name, value, other


def hash_of(files: Sequence[Path]) -> str:
    """SHA-256 of files, one behind another."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()
