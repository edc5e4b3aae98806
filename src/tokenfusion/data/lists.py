"""A CSV or JSONL that names images and their labels."""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenfusion.data.sources import SPLITS, Files, Source, printable, read_file
from tokenfusion.errors import InputError


@dataclass(eq=False, kw_only=True)
class Listed(Files):
    """Image files that a list names."""

    root: Path
    paths: list[str]
    """Relative to root, the list's own folder."""

    def read(self, index: int) -> bytes:
        return read_file(os.path.join(self.root, self.paths[index]))


def open_list(path: Path) -> Source:
    """Open a CSV with columns `path,label[,split]`, or a JSONL with such fields; paths start at its folder."""
    paths: list[str] = []
    labels: list[str] = []
    splits: list[str] = []
    try:
        for line, row in read_csv(path) if path.suffix.lower() == ".csv" else read_jsonl(path):
            where = f"{path}, line {line}"
            paths.append(inside(require(row, "path", where), where))
            labels.append(printable(require(row, "label", where)))
            splits.append(known_split(row, where))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a UTF-8 file with path,label[,split]") from error
    classes = sorted(set(labels))
    label = {name: index for index, name in enumerate(classes)}
    return Listed(
        where=str(path),
        classes=tuple(classes),
        names=[printable(name) for name in paths],
        labels=np.array([label[name] for name in labels], dtype=np.int64),
        splits=splits,
        root=path.parent,
        paths=paths,
    )


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if not {"path", "label"} <= set(reader.fieldnames or []):
            raise InputError(f"{path}: its first line is {reader.fieldnames}; it must name columns path,label[,split]")
        for row in reader:
            yield reader.line_num, row


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {line}: not JSON ({error}); give one object per line") from error
            if not isinstance(row, dict):
                raise InputError(f'{path}, line {line}: {text.strip()[:40]!r} is not like {{"path": …, "label": …}}')
            yield line, row


def require(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if value is None or isinstance(value, dict | list) or str(value) == "":
        raise InputError(f"{where}: {name}={value!r}; every image needs a path and a label")
    return str(value)


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
