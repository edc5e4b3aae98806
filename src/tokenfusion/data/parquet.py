"""Parquet files in the Hugging Face image layout: a column of {bytes, path} structs and a column of labels."""

import json
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokenfusion.data.dataset import SPLITS, Dataset, Files, describe_ignored, printable, quoted
from tokenfusion.data.decode import UnreadableImage
from tokenfusion.errors import InputError

CACHE_BYTES = 256 * 2**20
"""Most encoded images, in bytes, that are held in memory; at least one row group is."""


class RowGroups:
    """The row groups that were read last.

    Parquet is read a row group at a time: in order, once each; in random order, fast while they fit in CACHE_BYTES.
    """

    def __init__(self) -> None:
        self.groups: OrderedDict[tuple[Path, int], pa.ChunkedArray] = OrderedDict()
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type["RowGroups"], tuple[()]]:
        return RowGroups, ()  # another process starts with none

    def get(self, path: Path, group: int, column: str) -> pa.ChunkedArray:
        """The image files of one row group, as binary values."""
        with self.lock:
            if (path, group) not in self.groups:
                self.groups[path, group] = read_row_group(path, group, column)
                while len(self.groups) > 1 and sum(values.nbytes for values in self.groups.values()) > CACHE_BYTES:
                    self.groups.popitem(last=False)
            self.groups.move_to_end((path, group))
            return self.groups[path, group]


def read_row_group(path: Path, group: int, column: str) -> pa.ChunkedArray:
    # Arrow's own threads do not survive a fork into a loader worker.
    with pq.ParquetFile(path, memory_map=True) as file:
        return image_files(file, group, column)


def image_files(file: pq.ParquetFile, group: int, column: str) -> pa.ChunkedArray:
    """The image files of one row group, as binary values."""
    values = file.read_row_group(group, columns=[column], use_threads=False)[column]
    return pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values


@dataclass(eq=False, kw_only=True)
class Parquet(Files):
    """Image files in the rows of Parquet files."""

    groups: list[tuple[Path, int]]
    """Files and row groups, in the order of the images."""
    starts: list[int]
    """Index of each row group's first image."""
    column: str
    cache: RowGroups = field(default_factory=RowGroups)

    def read(self, index: int) -> bytes:
        group = bisect_right(self.starts, index) - 1
        try:
            values = self.cache.get(*self.groups[group], self.column)
        except (pa.ArrowException, OSError) as error:
            raise UnreadableImage(f"its row group cannot be read: {error}") from error
        value = values[index - self.starts[group]].as_py()
        if value is None:
            raise UnreadableImage("the row holds no bytes; image files must be inside the Parquet file")
        return value


@dataclass(frozen=True)
class Layout:
    """Which columns hold image and label, and the names of integer labels where the metadata has them."""

    image: str
    label: str
    kind: pa.DataType
    """What the labels are read as: int64 or string."""
    names: tuple[str, ...]


def open_parquet(root: Path, files: list[str], others: Sequence[str] = ()) -> Dataset:
    """Open Parquet files, given relative to `root`; their names tell the splits. Other files there are ignored."""
    layouts: dict[Layout, str] = {}
    groups: list[tuple[Path, int]] = []
    sizes: list[int] = []
    names: list[str] = []
    values: list[pa.ChunkedArray] = []
    splits: list[str] = []
    for name in files:
        try:
            with pq.ParquetFile(root / name, memory_map=True) as file:
                layout = read_layout(root / name, file.schema_arrow)
                values.append(file.read(columns=[layout.label])[layout.label].cast(layout.kind))
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{root / name}: not readable as Parquet ({error}); replace it or take it away") from error
        layouts.setdefault(layout, name)
        groups += [(root / name, group) for group in range(len(rows))]
        sizes += rows
        names += [f"{printable(name)}:{row}" for row in range(sum(rows))]
        splits += [split_of(name)] * sum(rows)
    if len(layouts) > 1:
        one, other = list(layouts.items())[:2]
        raise InputError(
            f"{root}: {one[1]!r} and {other[1]!r} differ in columns, labels or class names: {one[0]}, {other[0]}"
        )
    layout = next(iter(layouts))
    classes, labels = read_labels(root, layout, values, names)
    return Parquet(
        where=str(root),
        classes=classes,
        names=names,
        labels=labels,
        splits=splits,
        **describe_ignored(others),
        groups=groups,
        starts=np.cumsum([0, *sizes])[:-1].tolist(),
        column=layout.image,
    )


def split_of(name: str) -> str:
    """The split in a file's name, or else in its folder's: `set-test-00000.parquet`, `val/0.parquet`."""
    for part in reversed(Path(name).parts):
        for word in re.split(r"[-._]", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return ""


def read_layout(path: Path | str, schema: pa.Schema) -> Layout:
    features = read_features(schema)
    images = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    images += [column.name for column in schema if holds_files(column.type)]
    if not images:
        raise InputError(f"{path}: columns {quoted(schema.names)} hold no images; one must be a struct {{bytes, path}}")
    label = label_column(path, schema, features)
    kind = label_kind(schema.field(label).type)
    if kind is None:
        raise InputError(
            f"{path}: column {label!r} is {schema.field(label).type}, which is no label; give integers or strings"
        )
    names = features.get(label, {}).get("names") or []
    names = list(names.values()) if isinstance(names, dict) else names
    if not isinstance(names, list):
        raise InputError(f"{path}: its metadata has names={names!r} for {label!r}; they must be a list of class names")
    return Layout(images[0], label, kind, tuple(map(str, names)))


def label_kind(kind: pa.DataType) -> pa.DataType | None:
    """What a column of labels is read as, None where it cannot hold labels; pandas categories are dictionaries."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return pa.int64()
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return pa.string() if is_text or pa.types.is_boolean(kind) else None


def read_features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What the Hugging Face library wrote about the columns; nothing where it did not write the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def holds_files(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in [kind.field(index).name for index in range(kind.num_fields)]
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def label_column(path: Path | str, schema: pa.Schema, features: dict[str, dict[str, Any]]) -> str:
    """The column `label` or `labels`, else the only one of class labels, else the only one of integers or strings."""
    for name in ("label", "labels"):
        if name in schema.names:
            return name
    marked = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    plain = [column.name for column in schema if label_kind(column.type) is not None]
    candidates = marked or plain
    if len(candidates) != 1:
        raise InputError(f"{path}: which of {quoted(candidates or schema.names)} is the label? Name it 'label'")
    return candidates[0]


def read_labels(
    root: Path, layout: Layout, values: list[pa.ChunkedArray], names: list[str]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and int64 labels (N,): integers as the metadata names them, else the sorted distinct values."""
    labels = pa.chunked_array([chunk for part in values for chunk in part.chunks], type=layout.kind)
    if labels.null_count:
        missing = labels.is_null().to_pylist().index(True)
        raise InputError(f"{root}: {names[missing]!r} has no label; every image needs one")
    if not layout.names:
        distinct = sorted(labels.unique().to_pylist())
        order = pc.index_in(labels, value_set=pa.array(distinct, type=labels.type))
        return tuple(printable(str(value)) for value in distinct), order.to_numpy().astype(np.int64)
    if not pa.types.is_integer(labels.type):
        raise InputError(f"{root}: column {layout.label!r} is {labels.type}, but its metadata names integer labels")
    numbers = labels.to_numpy().astype(np.int64)
    outside = np.flatnonzero((numbers < 0) | (numbers >= len(layout.names)))
    if len(outside):
        raise InputError(
            f"{root}: {names[outside[0]]!r} has label {numbers[outside[0]]}, but the metadata has {len(layout.names)} "
            "class names; take unlabelled files away"
        )
    return layout.names, numbers
