"""Parquet files in the Hugging Face image layout: a column of {bytes, path} structs and a column of labels."""

import mmap
import os
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokenfusion.data.cache import default_cache
from tokenfusion.data.columns import warn_of_groups, warn_of_no_classes
from tokenfusion.data.dataset import Dataset, printable, quoted
from tokenfusion.data.decode import UnreadableImage
from tokenfusion.data.ignored import describe_ignored
from tokenfusion.data.labels import number_labels
from tokenfusion.data.parquet_cells import read_cells
from tokenfusion.data.parquet_layout import Layout, read_labels, read_layout, read_splits, refuse_paths_alone, texts_in
from tokenfusion.data.readers import Reader, refuse_pointer
from tokenfusion.data.remote import look_up
from tokenfusion.data.rows import as_groups, as_weights, read_weight
from tokenfusion.data.split_names import SPLITS, split_in_name, split_named, words_of
from tokenfusion.errors import InputError
from tokenfusion.recipe import Reading

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


class ParquetRows(Reader):
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

    def __reduce__(self) -> tuple[type["ParquetRows"], tuple[list[Table], str]]:
        return ParquetRows, (self.tables, self.column)  # another process starts with nothing in memory

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


def open_parquet(root: Path, files: list[str], others: Sequence[str], reading: Reading) -> Dataset:
    """Open Parquet files, given relative to `root`; a column or their names tell the splits. Others are ignored.

    Raises:
        InputError: a file cannot be read, columns are not clear, or files do not belong together.
    """
    refuse_configs(root, files)
    layouts: dict[str, Layout] = {}
    tables: list[Table] = []
    names: list[str] = []
    labels: list[Any] = []
    splits: list[str] = []
    suspected: list[str] = []
    beside: dict[str, list[Any]] = {"weight": [], "group": []}
    for name in files:
        refuse_pointer(root / name)
        try:
            with pq.ParquetFile(root / name, memory_map=True) as file:
                layout = layouts[name] = read_layout(root / name, file, reading)
                refuse_paths_alone(root / name, file, layout.image)
                labels += named_as(next(iter(layouts.values())), layout, read_labels(root / name, file, layout))
                tables.append(read_table(root / name, file, layout.image))
                count = sum(tables[-1].rows)
                columns = [column for column in (layout.split, layout.weight, layout.group) if column]
                cells = read_cells(root / name, file, columns)
                suspected += warn_of_no_classes(layout.one_hot, layout.left, partial(texts_in, file))
                if not layout.group and not reading.group_by:
                    suspected += warn_of_groups(layout.left, partial(texts_of, root / name, file))
        except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            raise InputError(f"{root / name}: not readable as Parquet ({error}); replace it or take it away") from error
        names += [f"{printable(name)}:{row}" for row in range(count)]
        told = read_splits(root / name, cells[layout.split], layout) if layout.split else []
        splits += told if any(told) else [split_in_name(name)] * count
        for role, values in beside.items():
            values += cells.get(getattr(layout, role), [None] * count)
    (first, layout), *more = layouts.items()
    for other, its in more:
        if words := layout.differs(its):
            raise InputError(f"{root}: {first!r} and {other!r} differ: {words}; make them alike, or give one of them")
    classes, numbers = number_all(str(root), names, labels, layout)
    weights = [read_weight(value, name) for name, value in zip(names, beside["weight"], strict=True)]
    notes = [layout.in_words()] * (not layout.usual) + list(dict.fromkeys(suspected))
    return Dataset(
        where=str(root),
        names=names,
        labels=numbers,
        classes=classes,
        splits=splits,
        weights=as_weights(str(root), names, weights),
        groups=as_groups(["" if value is None else str(value) for value in beside["group"]]),
        reader=ParquetRows(tables, layout.image),
        notes=tuple(notes),
        **describe_ignored(others),
    )


def texts_of(path: Path, file: pq.ParquetFile, column: str) -> list[str]:
    """A column's cells as texts, one a row."""
    return [str(value) for value in read_cells(path, file, [column])[column]]


def refuse_configs(root: Path, files: list[str]) -> None:
    """Refuse several data sets below one root, as Hugging Face's configurations are: one would be merged into another.

    They are told by folders that hold the same split, or files of one name; and by names that begin differently and
    have the same splits each, such as `en-train.parquet`, `en-test.parquet`, `fr-train.parquet`, `fr-test.parquet`.
    """
    named: dict[str, set[str]] = {}
    for file in files:
        named.setdefault(before_split(file), set()).add(split_in_name(file))
    (first, *others), splits = named, {*map(frozenset, named.values())}
    if others and len(splits) == 1 and len(min(splits)) > 1:
        raise InputError(
            f"{root}: holds several data sets, whose files begin with {quoted([first, *others][:3])}, each with "
            f"{quoted(sorted(min(splits)))}; move each into a folder of its own, and give one of them"
        )
    seen: dict[tuple[str, str], str] = {}
    for file in files:
        parts = [part for part in Path(file).parts[:-1] if not split_named(part)]
        config, split = "/".join(parts), split_in_name(file)
        key = (split, "" if split else os.path.basename(file))
        other = seen.setdefault(key, config)
        if other != config:
            raise InputError(
                f"{root}: holds several data sets, in {other or '.'!r} and {config or '.'!r}, each with "
                f"{split or os.path.basename(file)!r}; give one of them, such as {root / (config or other)}"
            )


def before_split(file: str) -> str:
    """What stands in a file's name before the word of its split: `en` in `en-train-00000-of-00001.parquet`."""
    words = words_of(os.path.basename(file))
    return "-".join(words[: next((place for place, word in enumerate(words) if word in SPLITS), 0)])


def named_as(first: Layout, layout: Layout, labels: list[Any]) -> list[Any]:
    """Integer labels of a file as the first file numbers its classes, where both name the same in another order."""
    if layout.names == first.names or set(layout.names) != set(first.names):
        return labels
    number = {index: first.names.index(name) for index, name in enumerate(layout.names)}
    if layout.several:
        return [[number.get(label, label) for label in row] for row in labels]
    return [number.get(label, label) for label in labels]


def number_all(where: str, names: list[str], labels: list[Any], layout: Layout) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and labels int64 (N,), or bool (N, K) where rows have lists of them."""
    if layout.one_hot and all(len(row) == 1 for row in labels):
        return number_labels(where, names, [row[0] for row in labels], layout.names)
    if not layout.several:
        return number_labels(where, names, labels, layout.names)
    if twice := next((row for row in zip(names, labels, strict=True) if len(set(row[1])) < len(row[1])), None):
        raise InputError(
            f"{where}: {twice[0]!r} has labels {quoted([*map(str, twice[1])][:5])}; name each label once, in place "
            "of a vector of 0 and 1"
        )
    owners = [name for name, row in zip(names, labels, strict=True) for _ in row]
    classes, numbers = number_labels(where, owners, [label for row in labels for label in row], layout.names)
    matrix = np.zeros((len(labels), len(classes)), dtype=bool)
    matrix[np.repeat(np.arange(len(labels)), [len(row) for row in labels]), numbers] = True
    if len(classes) > 1 and matrix.all():
        raise InputError(
            f"{where}: every image has all labels, {quoted(classes[:5])}; name those of each image, in place of a "
            "vector of 0 and 1"
        )
    return classes, matrix


def read_table(path: Path, file: pq.ParquetFile, column: str) -> Table:
    """What there is to know of a file without reading its images."""
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
    return Table(path, tuple(group.num_rows for group in groups), size)
