"""Which columns of a Parquet file hold images, labels, splits and weights: by name and by the type of the feature."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokenfusion.data.column_names import KNOWN, plain
from tokenfusion.data.columns import (
    are_hot,
    asked,
    choose,
    class_columns,
    may_be_class,
    name_splits,
    refuse_doubtful,
    refuse_unsure,
    split_column,
)
from tokenfusion.data.dataset import quoted
from tokenfusion.data.labels import clean_label
from tokenfusion.data.split_names import FLAGS, split_flagged, split_named
from tokenfusion.data.table import refuse_twice
from tokenfusion.errors import InputError
from tokenfusion.recipe import Reading

Features = Mapping[str, Mapping[str, Any]]
IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "jpg", "png", "jpeg")
"""What the column of images is called; one of the others, such as `mask`, is asked for."""


@dataclass(frozen=True)
class Layout:
    """Which columns hold image and label, and the names of integer labels where the metadata has them."""

    image: str
    label: str
    """"" where classes have a column of 0 or 1 each, `one_hot`."""
    kind: pa.DataType
    """What the labels are read as: int64 or string, or a list of either."""
    names: tuple[str, ...]
    one_hot: tuple[str, ...] = ()
    split: str = ""
    weight: str = ""
    group: str = ""
    left: tuple[str, ...] = ()
    """Columns that might have been the image or the label."""

    @property
    def usual(self) -> bool:
        """Whether nothing was guessed and nothing but image and label is read: all are called what they are here."""
        others = (*self.left, *self.one_hot, self.split, self.weight, self.group)
        return not any(others) and plain(self.image) in IMAGE_NAMES and self.label in ("label", "labels")

    @property
    def several(self) -> bool:
        """Whether a row has any number of labels."""
        return pa.types.is_list(self.kind)

    def differs(self, other: "Layout") -> str:
        """How another file's layout cannot be read together with this one, in words; "" where it can."""
        for what in ("image", "label"):
            if getattr(self, what) != getattr(other, what):
                return f"the column of the {what} is {getattr(self, what)!r} and {getattr(other, what)!r}"
        if self.kind != other.kind:
            return f"labels are of type {self.kind} and {other.kind}"
        if set(self.names) != set(other.names):
            only = sorted(set(self.names) ^ set(other.names))
            return f"of their {len(self.names)} and {len(other.names)} class names not both have {quoted(only[:3])}"
        return ""

    def in_words(self) -> str:
        """What was taken for what, and what was left."""
        read = {
            "image": self.image,
            "label": self.label,
            "split": self.split,
            "weight": self.weight,
            "group": self.group,
        }
        taken = ", ".join(f"{name!r} is the {what}" for what, name in read.items() if name)
        taken += f", {quoted(self.one_hot[:5])}{', ...' * (len(self.one_hot) > 5)} are classes of 0 and 1" * bool(
            self.one_hot
        )
        return f"columns: {taken}" + f"; not read: {quoted(self.left[:8])}" * bool(self.left)


def read_layout(path: Path | str, file: pq.ParquetFile, reading: Reading) -> Layout:
    """The columns of a file.

    Raises:
        InputError: there is no column of images or of labels, it is not clear which, or two are of one name.
    """
    schema = file.schema_arrow
    refuse_twice(path, schema.names)
    features = read_features(schema)
    image = image_column(path, schema, features, reading.image_column)
    label = asked(str(path), schema.names, reading.label_column, "--label-column")
    one_hot = () if label else one_hot_columns(str(path), file, schema, features)
    if not one_hot:
        label = label or label_column(path, schema, features)
    kind, names = label_type(path, label, schema, features) if label else (pa.list_(pa.int64()), one_hot)
    weight, group = (found[0] if (found := choose(schema.names, role)) else "" for role in ("weight", "group"))
    called = [name for name in schema.names if plain(name) in (*KNOWN["split"], *FLAGS)]
    candidates = [name for name in (called or holding_splits(file)) if name != label]
    split = split_column(str(path), candidates, lambda name: texts_in(file, name))
    used = {image, label, split, weight, group, *one_hot}
    left = tuple(name for name in schema.names if name not in used)
    refuse_doubtful(str(path), left, lambda name: texts_in(file, name))
    return Layout(image, label, kind, tuple(map(clean_label, names)), one_hot, split, weight, group, left)


def label_type(
    path: Path | str, label: str, schema: pa.Schema, features: Features
) -> tuple[pa.DataType, tuple[str, ...]]:
    """What a column of labels is read as, and the names of integers where the metadata has them.

    Raises:
        InputError: it cannot hold labels.
    """
    kind = label_kind(schema.field(label).type)
    if kind is None:
        raise InputError(
            f"{path}: column {label!r} is {schema.field(label).type}, which is no label; give integers or strings, or "
            "lists of them"
        )
    names = class_names(path, label, features)
    inner = kind.value_type if pa.types.is_list(kind) else kind
    if names and not pa.types.is_integer(inner):
        raise InputError(f"{path}: column {label!r} is {kind}, but its metadata names integer labels; give integers")
    return kind, names


def one_hot_columns(where: str, file: pq.ParquetFile, schema: pa.Schema, features: Features) -> tuple[str, ...]:
    """Classes whose columns hold 0 or 1, two or more, where no column is called as labels are."""
    if named_labels(schema, features):
        return ()
    kinds = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating)
    numbers = [c.name for c in schema if any(is_kind(c.type) for is_kind in kinds) and may_be_class(c.name)]
    values = {name: texts_in(file, name) for name in numbers}
    refuse_unsure(where, numbers, values.__getitem__)
    flags = [name for name in numbers if are_hot(values[name])]
    hot = class_columns({name: zeros_and_ones(file, name) for name in flags})
    return hot if len(hot) > 1 else ()


def zeros_and_ones(file: pq.ParquetFile, column: str) -> np.ndarray:
    """A column of 0 and 1, of -1 and 1, or of yes and no, as bool (N,)."""
    ones: np.ndarray = file.read(columns=[column], use_threads=False)[column].cast(pa.int64()).to_numpy() == 1
    return ones


def holding_splits(file: pq.ParquetFile) -> list[str]:
    """The columns of texts of which the first ones name splits."""
    texts = [column.name for column in file.schema_arrow if label_kind(column.type) == pa.string()]
    if not texts or not file.metadata.num_rows:
        return []
    first = next(file.iter_batches(batch_size=16, columns=texts, use_threads=False))
    return [name for name in texts if name_splits({str(value) for value in first[name].to_pylist()})]


def texts_in(file: pq.ParquetFile, column: str) -> set[str]:
    """The values in a column as texts, "" for none."""
    values = file.read(columns=[column], use_threads=False)[column].to_pylist()
    return {"" if value is None else str(value).strip() for value in values}


def image_column(path: Path | str, schema: pa.Schema, features: Features, given: str) -> str:
    """The column that is asked for; else the one of the usual name; else the only one of its type.

    A feature called Image goes before a struct with bytes, and that before plain bytes, which may be anything.
    """
    marked = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    structs = [column.name for column in schema if pa.types.is_struct(column.type) and holds_files(column.type)]
    plain_bytes = [column.name for column in schema if not pa.types.is_struct(column.type) and holds_files(column.type)]
    found = list(dict.fromkeys([*marked, *structs, *plain_bytes]))
    if asked(str(path), schema.names, given, "--image-column"):
        if given not in found:
            raise InputError(f"{path}: column {given!r} is {schema.field(given).type}, which holds no images")
        return given
    if not found:
        paths = [c.name for c in schema if pa.types.is_struct(c.type) and c.type.get_field_index("path") >= 0]
        if paths:
            raise InputError(
                f"{path}: column {paths[0]!r} holds paths instead of image files; embed the files, or give a folder "
                "with a metadata.csv of file_name and label"
            )
        raise InputError(f"{path}: columns {quoted(schema.names)} hold no images; one must be a struct {{bytes, path}}")
    usual = [name for name in found if plain(name) in IMAGE_NAMES]
    exact = [name for name in usual if plain(name) == "image"]
    for some in (exact, usual, marked, structs, plain_bytes):
        if len(some) == 1:
            return some[0]
        if some:
            break
    raise InputError(f"{path}: which of {quoted(some)} is the image? Say so by --image-column {some[0]}")


def class_names(path: Path | str, label: str, features: Features) -> tuple[str, ...]:
    """The names that the metadata has for integer labels, of one or of a list of them."""
    feature: Any = features.get(label, {})
    inner = feature.get("feature") if isinstance(feature.get("feature"), dict) else feature
    names = inner.get("names") or []
    names = list(names.values()) if isinstance(names, dict) else names
    if not isinstance(names, list):
        raise InputError(f"{path}: its metadata has names={names!r} for {label!r}; they must be a list of class names")
    return tuple(clean_label(name) for name in names)


def label_kind(kind: pa.DataType) -> pa.DataType | None:
    """What a column of labels is read as, None where it cannot hold labels; pandas categories are dictionaries."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = label_kind(kind.value_type)
        return None if inner is None or pa.types.is_list(inner) else pa.list_(inner)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return pa.int64()
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return pa.string() if is_text or pa.types.is_boolean(kind) else None


def read_features(schema: pa.Schema) -> Features:
    """What the Hugging Face library wrote about the columns; nothing where it did not write the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        listed = {name: {"feature": f[0]} if isinstance(f, list) and f else f for name, f in features.items()}
        return {name: feature for name, feature in listed.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def holds_files(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in [kind.field(index).name for index in range(kind.num_fields)]
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def label_column(path: Path | str, schema: pa.Schema, features: Features) -> str:
    """The column `label` or `labels`, else the only one of class labels, else the only one that may hold labels."""
    found = named_labels(schema, features)
    if not found:
        others = {*KNOWN["split"], *KNOWN["weight"], *KNOWN["group"], *FLAGS}
        found = [c.name for c in schema if label_kind(c.type) is not None and plain(c.name) not in others]
    if len(found) == 1:
        return found[0]
    raise InputError(
        f"{path}: which of {quoted(found or schema.names)} is the label? Name it 'label', or give --label-column"
    )


def named_labels(schema: pa.Schema, features: Features) -> list[str]:
    """The column `label` or `labels`, else those of class labels, else those that are called as labels are."""
    for name in ("label", "labels"):
        if name in schema.names:
            return [name]
    marked = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    usual = [
        column.name
        for column in schema
        if label_kind(column.type) is not None and plain(column.name) in (*KNOWN["label"], *KNOWN["labels"])
    ]
    return marked or usual


def read_labels(path: Path | str, file: pq.ParquetFile, layout: Layout) -> list[Any]:
    """The label of each row, or its list of labels."""
    if layout.one_hot:
        columns = np.stack([zeros_and_ones(file, name) for name in layout.one_hot], axis=1)
        return [np.flatnonzero(row).tolist() for row in columns]
    labels = file.read(columns=[layout.label], use_threads=False)[layout.label].cast(layout.kind)
    if labels.null_count:
        missing = labels.is_null().to_pylist().index(True)
        raise InputError(f"{path}:{missing} has no label; every image needs one")
    return labels.to_pylist()


def read_splits(path: Path | str, values: Sequence[Any], layout: Layout) -> list[str]:
    """The split of each row by its column."""
    flag = plain(layout.split) in FLAGS
    splits = []
    for row, value in enumerate(values):
        split = split_flagged(plain(layout.split), value) if flag else split_named("" if value is None else value)
        if split is None or (not split and value not in (None, "")):
            raise InputError(f"{path}:{row}: {layout.split}={value!r} is not known; give train, val or test")
        splits.append(split)
    return splits


def refuse_paths_alone(path: Path | str, file: pq.ParquetFile, column: str) -> None:
    """Refuse a column that holds no image file at all, as where its structs name files elsewhere.

    Its statistics tell or, without these, the first row that holds one.

    Raises:
        InputError: no row holds one.
    """
    rows, structs = file.metadata.num_rows, pa.types.is_struct(file.schema_arrow.field(column).type)
    name = f"{column}.bytes" if structs else column
    if not rows or any(holds_any(file, group, name) for group in range(file.num_row_groups)):
        return
    if structs:
        raise InputError(
            f"{path}: column {column!r} holds paths instead of image files in all {rows:,} rows; "
            "embed the files, or give a folder with a metadata.csv of file_name and label"
        )
    raise InputError(f"{path}: column {column!r} is empty in all {rows:,} rows; it must hold image files")


def holds_any(file: pq.ParquetFile, group: int, name: str) -> bool:
    """Whether a column, `struct.field` of a struct, has a value in a row group."""
    chunks = file.metadata.row_group(group)
    for chunk in map(chunks.column, range(chunks.num_columns)):
        if chunk.path_in_schema == name and chunk.statistics is not None and chunk.statistics.has_null_count:
            return bool(chunk.statistics.null_count < chunk.num_values)
    for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=[name], use_threads=False):
        values = batch.column(0)
        values = pc.struct_field(values, name.rpartition(".")[2]) if pa.types.is_struct(values.type) else values
        if values.null_count < len(values):
            return True
    return False
