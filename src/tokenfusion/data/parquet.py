"""Parquet files in the Hugging Face image layout: a column of {bytes, path} structs and a column of labels."""

import json
import mmap
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokenfusion.data.cache import default_cache
from tokenfusion.data.dataset import Dataset, describe_ignored, number_labels, printable, quoted, split_in_name
from tokenfusion.data.decode import UnreadableImage
from tokenfusion.data.readers import Reader
from tokenfusion.data.remote import look_up
from tokenfusion.errors import InputError

CACHE_BYTES = 256 * 2**20
"""Most encoded images, in bytes, that are held in memory; at least two row groups are."""
PASSES = 2
"""How often a file's row groups are read over, as for training and held-out images, before it is unpacked."""


@dataclass(frozen=True)
class Table:
    """A Parquet file as it was when it was opened."""

    path: Path
    rows: tuple[int, ...]
    """Of each row group."""
    size: int
    """Of all its images, in bytes, about."""


class Rows(Reader):
    """Image files in the rows of Parquet files.

    Parquet is read a row group at a time: in order, once each; in random order, fast while the row groups fit in
    CACHE_BYTES. A file that is read again after PASSES is unpacked into the cache that shards have, where any image
    can be read alone; where not all files find room there, it goes on by row groups.

    Args:
        tables: the files.
        column: which holds the images.
    """

    def __init__(self, tables: list[Table], column: str) -> None:
        self.tables, self.column = tables, column
        self.groups = [(file, group) for file, table in enumerate(tables) for group in range(len(table.rows))]
        self.starts = [0, *accumulate(tables[file].rows[group] for file, group in self.groups)]
        self.held: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self.reads: Counter[int] = Counter()
        self.unpacked: dict[int, list[pa.Array]] = {}
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Rows"], tuple[list[Table], str]]:
        return Rows, (self.tables, self.column)  # another process starts with nothing in memory

    def read(self, index: int) -> bytes:
        number = bisect_right(self.starts, index) - 1
        try:
            with self.lock:
                values = self.row_group(number)
        except (pa.ArrowException, OSError) as error:
            raise UnreadableImage(f"its row group cannot be read: {error}") from error
        value = values[index - self.starts[number]].as_py()
        if value is None:
            raise UnreadableImage("the row holds no bytes; image files must be inside the Parquet file")
        return value

    def row_group(self, number: int) -> pa.Array | pa.ChunkedArray:
        """The image files of one row group, as binary values."""
        file, group = self.groups[number]
        table = self.tables[file]
        if number not in self.held and self.reads[file] == PASSES * len(table.rows):
            self.reads[file] += 1  # whatever comes of it, it is tried once
            self.unpack(file)
        if file in self.unpacked:
            return self.unpacked[file][group]
        if number not in self.held:
            self.reads[file] += 1
            self.held[number] = read_row_group(table.path, group, self.column)
            while len(self.held) > 2 and sum(values.nbytes for values in self.held.values()) > CACHE_BYTES:
                self.held.popitem(last=False)
        self.held.move_to_end(number)
        return self.held[number]

    def unpack(self, file: int) -> None:
        """Have a file's images in the cache, mapped into memory, if there is room for those of all files."""
        table = self.tables[file]
        try:
            cache = default_cache()
            if sum(table.size for table in self.tables) > cache.limit:
                return
            key = look_up(str(table.path), root="").key
            with cache.open(f"{key}-rows", table.size, lambda path: write_rows(table, self.column, path)) as images:
                buffer = pa.py_buffer(mmap.mmap(images.fileno(), 0, access=mmap.ACCESS_READ))  # stays though evicted
        except (InputError, pa.ArrowException, OSError):
            return  # by row groups, whose reading tells what is wrong
        batches = pa.ipc.open_file(buffer, options=pa.ipc.IpcReadOptions(use_threads=False))
        self.unpacked[file] = [batches.get_batch(group).column(0) for group in range(len(table.rows))]


def read_row_group(path: Path, group: int, column: str) -> pa.ChunkedArray:
    # Arrow's own threads do not survive a fork into a loader worker.
    with pq.ParquetFile(path, memory_map=True) as file:
        return image_files(file, group, column)


def image_files(file: pq.ParquetFile, group: int, column: str) -> pa.ChunkedArray:
    """The image files of one row group, as binary values."""
    values = file.read_row_group(group, columns=[column], use_threads=False)[column]
    return pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values


def write_rows(table: Table, column: str, path: Path) -> None:
    """Write a file's images as Arrow does, a batch a row group."""
    schema = pa.schema([("image", pa.large_binary())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for group in range(len(table.rows)):
            images = read_row_group(table.path, group, column).cast(pa.large_binary()).combine_chunks()
            writer.write_batch(pa.record_batch([images], schema=schema))


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
    tables: list[Table] = []
    names: list[str] = []
    labels: list[int | str] = []
    splits: list[str] = []
    for name in files:
        try:
            with pq.ParquetFile(root / name, memory_map=True) as file:
                layout = read_layout(root / name, file.schema_arrow)
                labels += read_labels(root / name, file, layout)
                tables.append(read_table(root / name, file, layout.image))
        except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            raise InputError(f"{root / name}: not readable as Parquet ({error}); replace it or take it away") from error
        layouts.setdefault(layout, name)
        count = sum(tables[-1].rows)
        names += [f"{printable(name)}:{row}" for row in range(count)]
        splits += [split_in_name(name)] * count
    if len(layouts) > 1:
        one, other = list(layouts.items())[:2]
        raise InputError(
            f"{root}: {one[1]!r} and {other[1]!r} differ in columns, labels or class names: {one[0]}, {other[0]}"
        )
    layout = next(iter(layouts))
    classes, numbers = number_labels(str(root), names, labels, layout.names)
    return Dataset(
        where=str(root),
        names=names,
        labels=numbers,
        classes=classes,
        splits=splits,
        reader=Rows(tables, layout.image),
        **describe_ignored(others),
    )


def read_table(path: Path, file: pq.ParquetFile, column: str) -> Table:
    """What there is to know of a file without reading its images."""
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
    return Table(path, tuple(group.num_rows for group in groups), size)


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
    if names and not pa.types.is_integer(kind):
        raise InputError(f"{path}: column {label!r} is {kind}, but its metadata names integer labels; give integers")
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


def read_labels(path: Path | str, file: pq.ParquetFile, layout: Layout) -> list[int | str]:
    """The label of each row."""
    labels = file.read(columns=[layout.label], use_threads=False)[layout.label].cast(layout.kind)
    if labels.null_count:
        missing = labels.is_null().to_pylist().index(True)
        raise InputError(f"{path}:{missing} has no label; every image needs one")
    return labels.to_pylist()
