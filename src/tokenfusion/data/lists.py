"""A CSV or JSONL that names images and their labels."""

import csv
import difflib
import json
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tokenfusion.data.dataset import SPLITS, Dataset, printable
from tokenfusion.data.readers import Paths
from tokenfusion.errors import InputError

COLUMNS = "path,label[,split][,weight], or labels (a|b) in place of label"
KNOWN = ("path", "label", "labels", "split", "weight")
LONGEST_LINE = 2**20
"""Most characters of a line of a JSONL."""
SEVERAL = '"a|b" in a CSV or ["a", "b"] in a JSONL, and "" or [] for an image of no class'


def open_list(path: Path) -> Dataset:
    """Open a CSV with columns `path,label[,split][,weight]`, or a JSONL with such fields; paths start at its folder.

    With `labels` in place of `label` the data is multi-label: `a|b` in a CSV, a list in a JSONL, empty for none.
    """
    paths: list[str] = []
    labels: list[tuple[str, ...]] = []
    splits: list[str] = []
    weights: list[float | None] = []
    several: bool | None = None
    try:
        for line, row in read_csv(path) if path.suffix.lower() == ".csv" else read_jsonl(path):
            where = f"{path}, line {line}"
            if several is None:
                several = "labels" in row
            paths.append(inside(require(row, "path", where), where))
            labels.append(labels_in(row, where) if several else (printable(require(row, "label", where)),))
            splits.append(known_split(row, where))
            weights.append(read_weight(row, where))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a UTF-8 file with {COLUMNS}") from error
    classes = sorted({name for names in labels for name in names})
    number = {name: index for index, name in enumerate(classes)}
    if several:
        refuse_other_separator(path, labels, classes)
    return Dataset(
        where=str(path),
        classes=tuple(classes),
        names=[printable(name) for name in paths],
        labels=as_matrix(labels, number) if several else np.array([number[name] for (name,) in labels], dtype=np.int64),
        splits=splits,
        weights=as_weights(path, paths, weights),
        reader=Paths(path.parent, paths),
    )


def as_matrix(labels: list[tuple[str, ...]], number: dict[str, int]) -> np.ndarray:
    """bool (N, K): whether an image has each class."""
    matrix = np.zeros((len(labels), len(number)), dtype=bool)
    for row, names in zip(matrix, labels, strict=True):
        row[[number[name] for name in names]] = True
    return matrix


def as_weights(path: Path, paths: list[str], weights: list[float | None]) -> np.ndarray | None:
    """float64 (N,), or None where no image has a weight; refuses a list in which only some have one."""
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        name = paths[weights.index(None)]
        raise InputError(f"{path}: {name!r} has no weight while others have one; give one to all images or to none")
    return np.array(given) if given else None


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        refuse_header(str(path), tuple(reader.fieldnames or ()))
        for row in reader:
            yield reader.line_num, row


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for line, text in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), start=1):
            if len(text) == LONGEST_LINE:
                raise InputError(f"{path}, line {line}: more than {LONGEST_LINE:,} characters; give an object a line")
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {line}: not JSON ({error}); give one object per line") from error
            if not isinstance(row, dict):
                raise InputError(f'{path}, line {line}: {text.strip()[:40]!r} is not like {{"path": …, "label": …}}')
            if hint := misspelt(tuple(row)):
                raise InputError(f"{path}, line {line}: {hint}")
            yield line, row


def refuse_header(where: str, columns: tuple[str, ...]) -> None:
    """Refuse a CSV whose first line does not name the columns that are needed, each once and spelt as here."""
    if not columns:
        raise InputError(f"{where}: its first line is empty; it must name columns {COLUMNS}")
    if len(columns) == 1 and any(separator in columns[0] for separator in ";\t"):
        raise InputError(f"{where}: its first line is {columns[0]!r}; separate columns by commas")
    if hint := misspelt(columns):
        raise InputError(f"{where}: {hint}")
    if {"label", "labels"} <= set(columns):
        raise InputError(f"{where}: has columns label and labels; keep one")
    if "path" not in columns or not {"label", "labels"} & set(columns):
        raise InputError(f"{where}: its first line is {','.join(columns)!r}; it must name columns {COLUMNS}")


@lru_cache
def misspelt(columns: tuple[str, ...]) -> str:
    """What there is to say of a column that is almost one of the known ones which are missing; others are no concern.

    The first letters must agree, for a height is no weight.
    """
    missing = set(KNOWN).difference(columns, {"label", "labels"} if {"label", "labels"} & set(columns) else ())
    for column in columns:
        for name in difflib.get_close_matches(column.lower(), sorted(missing), n=1, cutoff=0.8):
            if column not in KNOWN and column[:1].lower() == name[0]:
                return f"column {column!r} is not known; did you mean {name}?"
    return ""


def refuse_other_separator(path: Path, labels: list[tuple[str, ...]], classes: list[str]) -> None:
    """Refuse a multi-label list that has no label, or whose labels seem to be separated by another character."""
    if not classes:
        raise InputError(f"{path}: no image has a label; name some in `labels`")
    joined = [name for name in classes if ";" in name or "," in name]
    if joined and all(len(names) < 2 for names in labels):
        raise InputError(
            f"{path}: {joined[0]!r} is a label, and no image has more than one label; labels are separated by |. "
            "If it is one name, call the column label"
        )


def require(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if value is None or isinstance(value, dict | list) or str(value) == "":
        raise InputError(f"{where}: {name}={value!r}; every image needs a path and a label")
    return str(value)


def labels_in(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The names in `labels`: `a|b` in a CSV, a list in a JSONL; empty for an image of no class."""
    value = row.get("labels")
    names = (value.split("|") if value else []) if isinstance(value, str) else value
    if "label" in row or not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise InputError(f"{where}: labels={value!r}; give every image `labels` and none `label`: {SEVERAL}")
    texts = tuple(printable(str(name)) for name in names)
    if len(set(texts)) < len(texts) or any(name == "" or "|" in name for name in texts):
        raise InputError(f"{where}: labels={value!r}; name each label once, none empty and none with | in it")
    return texts


def read_weight(row: dict[str, Any], where: str) -> float | None:
    """The row's `weight`; None where it has none."""
    value = row.get("weight")
    if value is None or value == "":
        return None
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(
            f"{where}: weight={value!r} is no weight; give a finite number above 0, or leave the image out"
        )
    return weight


def known_split(row: dict[str, Any], where: str) -> str:
    value = row.get("split") or ""
    if value != "" and str(value).lower() not in SPLITS:
        raise InputError(f"{where}: split={value!r} is not known; choose {', '.join(SPLITS)}, or leave the column out")
    return SPLITS.get(str(value).lower(), "")


def inside(path: str, where: str) -> str:
    """The path, normalised; refused when it leaves the list's folder."""
    normal = os.path.normpath(path)
    if os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir:
        raise InputError(f"{where}: path={path!r} leaves the list's folder; give paths relative to it, below it")
    return normal
