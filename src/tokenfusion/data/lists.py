"""A list that names images and their labels: CSV, TSV, columns of text, JSON or JSONL."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenfusion.data.column_names import KNOWN, plain
from tokenfusion.data.columns import Columns, choose_columns, is_true, warn_of_groups, warn_of_no_classes
from tokenfusion.data.dataset import Dataset, printable, quoted
from tokenfusion.data.ignored import describe_ignored, why_ignored
from tokenfusion.data.labels import as_whole, clean_label, no_label
from tokenfusion.data.paths import ListedPaths, exists, resolve_paths
from tokenfusion.data.rows import as_groups, as_weights, read_weight
from tokenfusion.data.split_names import (
    FLAGS,
    SPLITS,
    split_flagged,
    split_in_name,
    split_named,
    splits_in_paths,
    splits_in_words,
)
from tokenfusion.data.table import LONGEST_PATH, Table, read_table
from tokenfusion.errors import InputError
from tokenfusion.formatting import counted
from tokenfusion.recipe import Reading

SEVERAL = '"a|b" in a CSV or ["a", "b"] in a JSONL, and "" or [] for an image of no class'
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Lists of the Hugging Face image-folder layout, which name images beside or below them as `file_name`."""


def open_list(path: Path, reading: Reading) -> Dataset:
    """Open a list; its paths start at its folder, or at `reading.root`.

    Raises:
        InputError: it cannot be read, its columns are not clear, a row lacks something, or two rows contradict.
    """
    table = read_table(path, reading.encoding)
    if not table.rows:
        choose_columns(table, reading) if table.columns else None
        return empty_dataset(str(path))
    root = Path(reading.root) if reading.root else path.parent
    return from_tables(str(path), root, [("", table, "")], reading)


def open_image_folder(root: Path, lists: Sequence[str], files: Sequence[str], reading: Reading) -> Dataset:
    """Open the Hugging Face image-folder layout: lists called `metadata`, each naming images beside or below it.

    Args:
        root: the folder.
        lists: the lists, relative to it; the folders of several tell splits.
        files: all files below it; those that no list names are counted as ignored.
        reading: names of columns, where these were given.
    """
    tables = []
    for name in lists:
        table = metadata_table(root / name, reading)
        folder = os.path.dirname(name)
        tables.append((folder, table, split_in_name(folder) if folder else ""))
    dataset = from_tables(str(root), root, tables, reading, folders_tell=True)
    named = set(dataset.names) | set(lists)
    others = {file: why_ignored(file) or "not named in the metadata" for file in files if printable(file) not in named}
    note = f"read as an image folder of Hugging Face's, by {', '.join(map(repr, lists[:3]))}"
    return replace(dataset, notes=(note, *dataset.notes), **describe_ignored(others))


def metadata_lists(files: Sequence[str]) -> list[str]:
    """The lists of the image-folder layout among files; of one folder the first kind alone."""
    found: dict[str, str] = {}
    for kind in METADATA:
        for file in files:
            if os.path.basename(file) == kind and not any(part.startswith(".") for part in file.split("/")):
                found.setdefault(os.path.dirname(file), file)
    return sorted(found.values())


def names_images(path: Path, reading: Reading) -> bool:
    """Whether a metadata file labels images; one that only describes images in class folders does not."""
    table = metadata_table(path, reading)
    known = {plain(name) for name in table.columns}
    labelled = reading.label_column or known & {*KNOWN["label"], *KNOWN["labels"]}
    return bool(known & {"filename", "filenames"} and table.rows and labelled)


def metadata_table(path: Path, reading: Reading) -> Table:
    """The table in a list of the image-folder layout, whichever kind it is."""
    if path.suffix != ".parquet":
        return read_table(path, reading.encoding)
    from tokenfusion.data.parquet_cells import read_parquet_table

    return read_parquet_table(path, reading)


class Row(NamedTuple):
    """What a row says of an image."""

    place: str
    """The list and the line, for messages."""
    path: str
    labels: tuple[str, ...]
    split: str
    weight: float | None
    group: str


class TableRows(NamedTuple):
    """What a table says."""

    columns: Columns
    rows: list[Row]
    told: list[str]
    """What each row says of its split, as it is written."""
    several: list[Any]
    """The cells of the column where an image may have several labels; none without it."""
    notes: list[str]


def from_tables(
    where: str, root: Path, tables: list[tuple[str, Table, str]], reading: Reading, folders_tell: bool = False
) -> Dataset:
    """One dataset of tables, each with the folder that its paths start at, relative to `root`, and its split.

    Where neither a column nor that folder tells the split, the folders in the paths do if `folders_tell`; else a
    warning says that they might.
    """
    lists = [rows_of_table(where, root, *one, reading, folders_tell) for one in tables]
    rows = [row for one in lists for row in one.rows]
    notes = [note for one in lists for note in one.notes]
    if any(row.split for row in rows):
        cells = [cell for one in lists for cell in one.told]
        notes.append(splits_in_words([(cell, row.split) for cell, row in zip(cells, rows, strict=True)]))
    hot = {clean_label(name) for one in lists for name in one.columns.one_hot}
    if empty := hot - {name for row in rows for name in row.labels}:
        notes.append(f"warning: left out, because no row has a 1 there: {quoted(sorted(empty)[:5])}")
    refuse_other_separator(where, [cell for one in lists for cell in one.several])
    several = any(one.columns.labels for one in lists) or any(len(row.labels) != 1 for row in rows)
    rows, whole = with_whole_numbers(rows)
    notes += whole
    kept = without_repeats(where, rows)
    notes += [f"{counted(len(rows) - len(kept), 'exact repeat')} of a row, counted once"] * (len(kept) < len(rows))
    return from_rows(where, root, kept, several, notes)


def rows_of_table(
    where: str, root: Path, folder: str, table: Table, split: str, reading: Reading, folders_tell: bool
) -> TableRows:
    """What one of the tables that `from_tables` takes says, its paths relative to `root`, and what is to be noted."""
    columns = choose_columns(table, reading)
    rows = read_rows(table, columns)
    listed = [(row.place, row.path) for row in rows]
    paths, changes = resolve_paths(where, root / folder, listed, bool(reading.root))
    guessed = not columns.usual or not table.header or bool(columns.left)
    notes = [*table.notes, *[columns.in_words()] * guessed, *changes]
    notes += warn_of_bars(table, columns.label)
    notes += warn_of_no_classes(columns.one_hot, columns.left, table.texts)
    if not (columns.group or reading.group_by):
        notes += warn_of_groups(columns.left, lambda column: [str(row.get(column)) for _, row in table.rows])
    told = split_cells(table, columns) if columns.split else [folder] * len(rows)
    splits = [row.split or split for row in rows]
    by_path = splits_in_paths(paths) if not columns.split and not split else []
    if by_path and folders_tell:
        told, splits = map(list, zip(*by_path, strict=True))
    elif by_path:
        folders = quoted(sorted({name for name, _ in by_path}))
        notes.append(
            f"warning: paths lie in {folders}, which name splits, but no column "
            "tells them, and all images are taken together; add a column split to keep them apart"
        )
    placed = zip(rows, paths, splits, strict=True)
    rows = [row._replace(path=os.path.join(folder, path), split=its) for row, path, its in placed]
    several = [row.get(columns.labels) for _, row in table.rows] if columns.labels else []
    return TableRows(columns, rows, told, several, notes)


def from_rows(where: str, root: Path, rows: list[Row], several: bool, notes: list[str]) -> Dataset:
    """The dataset of rows, one an image, whose labels are many an image or one."""
    names, labels = [row.path for row in rows], [row.labels for row in rows]
    classes = sorted({name for row in rows for name in row.labels})
    if several and not classes:
        raise InputError(f"{where}: no image has a label; name some in `labels`")
    refuse_no_class(rows)
    number = {name: index for index, name in enumerate(classes)}
    missing = tuple(name for name in names if not exists(root, name))
    if missing and 2 * len(missing) <= len(names):
        notes.append(f"warning: {len(missing):,} of {len(names):,} paths do not exist, the first is {missing[0]!r}")
    return Dataset(
        where=where,
        classes=tuple(classes),
        names=[printable(name) for name in names],
        labels=as_matrix(labels, number) if several else np.array([number[name] for (name,) in labels], dtype=np.int64),
        splits=[row.split for row in rows],
        weights=as_weights(where, names, [row.weight for row in rows]),
        groups=as_groups([row.group for row in rows]),
        reader=ListedPaths(root, names, where, missing),
        notes=tuple(dict.fromkeys(notes)),
    )


def empty_dataset(where: str) -> Dataset:
    reader = ListedPaths(Path(), [], where)
    return Dataset(where=where, classes=(), names=[], labels=np.empty(0, dtype=np.int64), splits=[], reader=reader)


def warn_of_bars(table: Table, label: str) -> list[str]:
    """A warning where labels, one an image, hold the sign that separates several."""
    bars = sorted(text for text in table.texts(label) if "|" in text) if label else []
    said = "is taken for one label; where | separates several, call the column labels"
    return [f"warning: {text!r} of {label!r} {said}" for text in bars[:1]]


def split_cells(table: Table, columns: Columns) -> list[str]:
    """What each row says of its split, as it is written; of a flag with the column's name."""
    flag = f"{columns.split}=" * (plain(columns.split) in FLAGS)
    return [f"{flag}{row.get(columns.split)}".strip() for _, row in table.rows]


def read_rows(table: Table, columns: Columns) -> list[Row]:
    """The rows of a table, in order."""
    rows = []
    for where, row in table.rows:
        path = require(row, columns.path, where, "path")
        if columns.labels:
            labels = labels_in(row, columns.labels, where)
        elif columns.one_hot:
            labels = tuple(clean_label(name) for name in columns.one_hot if is_true(row.get(name)))
        else:
            labels = (clean_label(require(row, columns.label, where, "label")),)
        group = str(row.get(columns.group) or "") if columns.group else ""
        weight = read_weight(row.get(columns.weight), where) if columns.weight else None
        rows.append(Row(where, path, labels, known_split(row, columns.split, where), weight, group))
    return rows


def with_whole_numbers(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """Rows whose labels are written as whole numbers where that is what they are, and a line that says so."""
    whole = as_whole({name for row in rows for name in row.labels})
    if not whole:
        return rows, []
    label, number = min(whole.items())
    numbered = [row._replace(labels=tuple(whole.get(name, name) for name in row.labels)) for row in rows]
    return numbered, [f"labels are whole numbers: {label!r} is read as {number!r}"]


def without_repeats(where: str, rows: list[Row]) -> list[Row]:
    """The first row of each image.

    Raises:
        InputError: two rows say different things of one image.
    """
    first: dict[str, Row] = {}
    for row in rows:
        other = first.setdefault(row.path, row)
        if other[1:] == row[1:]:
            continue
        lines = f"{other.place.removeprefix(f'{where}, ')} and {row.place.removeprefix(f'{where}, ')}"
        for what in ("labels", "split", "weight", "group"):
            one, two = getattr(other, what), getattr(row, what)
            if one != two:
                said = [repr("|".join(value) if isinstance(value, tuple) else value) for value in (one, two)]
                remedy = ", or, where an image has several, call the column labels (a|b)" * (what == "labels")
                raise InputError(
                    f"{where}: {row.path!r} stands twice, with {what.removesuffix('s')} {said[0]} and {said[1]} "
                    f"({lines}); keep one{remedy}"
                )
    return list(first.values())


def as_matrix(labels: list[tuple[str, ...]], number: dict[str, int]) -> np.ndarray:
    """bool (N, K): whether an image has each class."""
    matrix = np.zeros((len(labels), len(number)), dtype=bool)
    for row, names in zip(matrix, labels, strict=True):
        row[[number[name] for name in names]] = True
    return matrix


def refuse_no_class(rows: list[Row]) -> None:
    """Refuse -1, which stands for no label; beside 1 alone it is a class."""
    if (label := no_label({name for row in rows for name in row.labels})) is not None:
        place = next(row.place for row in rows if label in row.labels)
        raise InputError(f"{place}: label {label} stands for no label; take unlabelled images out of the list")


def refuse_other_separator(where: str, cells: list[Any]) -> None:
    """Refuse cells of `labels`, none of which has a |, where they seem to be separated by another character."""
    texts = [cell.strip() for cell in cells if isinstance(cell, str)]
    joined = next((text for text in texts if {*text} & {*";, "}), "")
    if joined and not any("|" in text for text in texts):
        raise InputError(
            f"{where}: {joined!r} is a label, and no image has more than one label; labels are separated by |. "
            "If it is one name, call the column label"
        )


def require(row: dict[str, Any], name: str, where: str, role: str) -> str:
    """What a row says of its image's path or label, which must not be empty."""
    value = row.get(name)
    if role == "path" and isinstance(value, dict) and isinstance(value.get("path"), str):
        value = value["path"]  # as Hugging Face's library writes an image to JSON
    if value is None or isinstance(value, dict | list) or str(value).strip() == "":
        called = role if plain(name) == role or name.startswith("column ") else name
        raise InputError(f"{where}: {called}={value!r}; every image needs a path and a label")
    if role == "path" and len(str(value)) > LONGEST_PATH:
        raise InputError(f"{where}: a path of {len(str(value)):,} characters, {str(value)[:40]!r} ...; mend the row")
    return str(value).strip(" ") if role == "path" else str(value)


def labels_in(row: dict[str, Any], column: str, where: str) -> tuple[str, ...]:
    """The names in `labels`: `a|b` in a CSV, a list in a JSONL; empty for an image of no class."""
    value = row.get(column)
    names = (value.split("|") if value else []) if isinstance(value, str) else value
    both = column == "labels" and "label" in row
    if both or not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise InputError(f"{where}: labels={value!r}; give every image `labels` and none `label`: {SEVERAL}")
    texts = tuple(clean_label(name) for name in names)
    if len(set(texts)) < len(texts) or any(name == "" or "|" in name for name in texts):
        raise InputError(f"{where}: labels={value!r}; name each label once, none empty and none with | in it")
    return texts


def known_split(row: dict[str, Any], column: str, where: str) -> str:
    """The split of a row; "" where it says none."""
    value = row.get(column) if column else None
    if plain(column) in FLAGS:
        return split_flagged(plain(column), value) or ""
    if value is None or str(value).strip() == "":
        return ""
    if not (split := split_named(value)):
        raise InputError(f"{where}: split={value!r} is not known; choose {', '.join(SPLITS)}, or leave the column out")
    return split
