"""Cells of Parquet columns as Python's values, and tables of them that name images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tokenfusion.data.column_names import KNOWN, plain
from tokenfusion.data.parquet_layout import class_names, read_features
from tokenfusion.data.split_names import FLAGS
from tokenfusion.data.table import Table, refuse_twice
from tokenfusion.errors import InputError
from tokenfusion.recipe import Reading

ROLES = frozenset(name for names in KNOWN.values() for name in names) | FLAGS.keys()
"""What columns that are read are called."""


def read_cells(path: Path | str, file: pq.ParquetFile, columns: Sequence[str]) -> dict[str, list[Any]]:
    """The cells of some columns; times and dates as text, for Python's cannot hold all of them.

    Args:
        path: of the file, for messages.
        file: it, opened.
        columns: their names, each of one column.

    Raises:
        InputError: a cell cannot be read, such as text that is not UTF-8; with the column's name.
    """
    cells: dict[str, list[Any]] = {}
    for name in columns:
        try:
            values = file.read(columns=[name], use_threads=False)[name]
            cells[name] = (values.cast(pa.string()) if pa.types.is_temporal(values.type) else values).to_pylist()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise InputError(f"{path}: column {name!r} cannot be read ({error}); mend it") from error
    return cells


def read_parquet_table(path: Path, reading: Reading) -> Table:
    """A table of Parquet that names images; only columns that may say something of them are read.

    These are known by their names, or hold numbers or yes and no. Integers that the Hugging Face library gave names,
    as of its ClassLabel, are read as these.

    Raises:
        InputError: it cannot be read, or two columns are of one name.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
            refuse_twice(path, schema.names)
            cells = read_cells(path, file, [field.name for field in schema if may_tell(field, reading)])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not readable as Parquet ({error}); replace it or take it away") from error
    features = read_features(schema)
    for name, values in cells.items():
        if names := class_names(path, name, features):
            cells[name] = [named(f"{path}, row {row}", value, names) for row, value in enumerate(values)]
    rows = [(f"{path}, row {row}", {name: values[row] for name, values in cells.items()}) for row in range(count)]
    return Table(str(path), tuple(schema.names), rows)


def may_tell(field: pa.Field, reading: Reading) -> bool:
    """Whether a column may be a path, a label, or what else is known of an image."""
    kind = field.type
    called = field.name in (reading.path_column, reading.label_column) or plain(field.name) in ROLES
    return called or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def named(where: str, value: Any, names: Sequence[str]) -> Any:
    """A label, or each of a list of them, by its name."""
    if isinstance(value, list):
        return [named(where, number, names) for number in value]
    if isinstance(value, int) and not 0 <= value < len(names):
        raise InputError(
            f"{where}: label {value}, none of the {len(names)} class names; add its name, or take the row away"
        )
    return names[value] if isinstance(value, int) else value
