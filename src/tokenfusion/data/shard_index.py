"""What is known of a shard's images without keeping them: where each lies, and what is said of it."""

import json
import tarfile
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tokenfusion.data.column_names import plain
from tokenfusion.data.columns import choose
from tokenfusion.data.dataset import printable, quoted
from tokenfusion.data.decode import EXTENSIONS
from tokenfusion.data.rows import read_weight
from tokenfusion.data.split_names import FLAGS, split_flagged, split_named
from tokenfusion.data.tar import Header, refuse_damage
from tokenfusion.errors import InputError
from tokenfusion.recipe import Reading

MAX_LABEL_BYTES = 2**20
INDEX_VERSION = 4


@dataclass
class Index:
    """What is known of a shard's images, one entry each."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Where each image file begins, in bytes: in the tar, or among the Parquet file's images one behind another."""
    sizes: list[int] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    """As `split` says, "" where it says none; of all images or, where none says so, of none. So are these:"""
    weights: list[float | None] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    """Names of integer labels, where the shard has them."""
    ignored: int = 0
    version: int = INDEX_VERSION


def index_tar(name: str, file: BinaryIO) -> Index:
    """Go through the headers of a tar of `key.jpg` with `key.cls`, or with `key.json` that has a `label`; the JSON may
    have `split`, `weight` and `group` too.

    Source: github.com/webdataset/webdataset. A key ends at the first dot behind its last slash.
    """
    index = Index()
    labels: dict[str, int | str] = {}
    said: dict[str, Row] = {}
    images: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as tar:
            for member in tar:
                key, ending = split_name(member.name)
                if not member.isreg() or member.issparse():
                    index.ignored += not member.isdir()
                elif ending in EXTENSIONS:
                    if key in images:
                        raise InputError(f"{name}: {images[key]!r} and {member.name!r} are one sample; leave one out")
                    images[key] = member.name
                    index.offsets.append(member.offset_data)
                    index.sizes.append(member.size)
                elif ending in (".cls", ".json"):
                    place, data = f"{name}/{member.name}", read_member(name, tar, member)
                    label = label_of(place, data, ending)
                    if ending == ".json":
                        said[key] = row_of(place, data)
                    if label is not None and (ending == ".cls" or key not in labels):
                        labels[key] = label
                else:
                    index.ignored += 1
            refuse_damage(name, tar)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(
            f"{name}: not a plain tar, or a truncated one ({error}); pack it again without compression, or take it away"
        ) from error
    for key, image in images.items():
        if key not in labels:
            raise InputError(
                f"{name}: {image!r} has no label; beside key.jpg a shard needs key.cls, or key.json with a 'label'"
            )
        index.names.append(printable(image))
        index.labels.append(labels[key])
    rows = [said.get(key, Row()) for key in images]
    if any(row.split for row in rows):
        index.splits = [row.split for row in rows]
    if any(row.weight is not None for row in rows):
        index.weights = [row.weight for row in rows]
    if any(row.group for row in rows):
        index.groups = [row.group for row in rows]
    return index


def split_name(name: str) -> tuple[str, str]:
    """A member's key, and its ending in lower case."""
    folder, slash, file = name.rpartition("/")
    key, dot, ending = file.partition(".")
    return folder + slash + key, (dot + ending).lower()


def read_member(name: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_LABEL_BYTES:
        raise InputError(f"{name}: {member.name!r} has {member.size} bytes, too many for a label; take it out")
    file = tar.extractfile(member)
    assert file is not None
    data = file.read()
    if len(data) < member.size:
        raise tarfile.ReadError(f"it ends inside {member.name!r}")
    return data


def label_of(name: str, data: bytes, ending: str) -> int | str | None:
    """What a `.cls` or `.json` says: an integer or a text; None for JSON without a label."""
    try:
        text = data.decode().strip()
        if ending == ".cls":
            return int(text) if text.lstrip("-").isdecimal() else text or None
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not readable as {'text' if ending == '.cls' else 'JSON'} ({error})") from error
    label = value.get("label") if isinstance(value, dict) else None
    if label is None or (isinstance(label, int | str) and not isinstance(label, bool)):
        return label
    raise InputError(f"{name}: label {label!r} is neither an integer nor a text")


class Row(NamedTuple):
    """What is said of an image beside its label."""

    split: str = ""
    weight: float | None = None
    group: str = ""


def row_of(name: str, data: bytes) -> Row:
    """What a sample's JSON says beside the label; its text was read by `label_of`."""
    value = json.loads(data.decode())
    if not isinstance(value, dict):
        return Row()
    weight, group = (next((value[key] for key in choose([*value], role)), None) for role in ("weight", "group"))
    return Row(split_of(name, value), read_weight(weight, name), "" if group is None else str(group))


def split_of(name: str, value: dict[str, object]) -> str:
    """The split that a sample's JSON says, as a list's column does or by a flag such as `is_valid`; "" where it says
    none."""
    for key in choose([*value], "split"):
        if (told := value[key]) in (None, ""):
            continue
        if split := split_named(told):
            return split
        if plain(key) != "split":
            continue
        raise InputError(f"{name}: split={str(told)[:40]!r} is not known; give train, val or test")
    flags = [key for key in value if plain(key) in FLAGS]
    if len(flags) > 1:
        raise InputError(f"{name}: {quoted(flags)} all tell splits; keep one, or give split")
    for key in flags:
        if (split := split_flagged(plain(key), value[key]) or "") == "":
            raise InputError(f"{name}: {key}={str(value[key])[:40]!r} is neither yes nor no; give true or false")
        return split
    return ""


def is_webdataset(path: Path) -> bool:
    """Whether a tar's first files are images with labels beside them, rather than class folders."""
    try:
        with tarfile.open(path, "r:", tarinfo=Header) as tar:
            files = [split_name(member.name) for member, _ in zip(tar, range(16), strict=False) if member.isreg()]
    except (tarfile.TarError, OSError):
        return False
    images = {key for key, ending in files if ending in EXTENSIONS}
    return any(key in images and ending in (".cls", ".json") for key, ending in files)


def index_parquet(name: str, file: BinaryIO, reading: Reading) -> Index:
    """Read through a Parquet file, a row group at a time."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from tokenfusion.data.parquet import image_files
    from tokenfusion.data.parquet_cells import read_cells
    from tokenfusion.data.parquet_layout import read_labels, read_layout, read_splits

    try:
        with pq.ParquetFile(file) as table:
            layout = read_layout(name, table, reading)
            labels = read_labels(name, table, layout)
            if layout.one_hot and all(len(row) == 1 for row in labels):
                labels = [row[0] for row in labels]
            elif layout.several:
                raise InputError(
                    f"{name}: several labels an image are read from local Parquet files only; give their folder"
                )
            columns = [column for column in (layout.split, layout.weight, layout.group) if column]
            cells = read_cells(name, table, columns)
            parts = (image_files(table, part, layout.image) for part in range(table.num_row_groups))
            sizes = [size for images in parts for size in pc.binary_length(images).fill_null(0).to_pylist()]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: not readable as Parquet ({error}); replace it or take it away") from error
    names = [str(row) for row in range(len(sizes))]
    splits = read_splits(name, cells[layout.split], layout) if layout.split else []
    weights = [read_weight(value, f"{name}:{row}") for row, value in enumerate(cells.get(layout.weight, []))]
    groups = ["" if value is None else str(value) for value in cells.get(layout.group, [])]
    return Index(
        names,
        [0, *accumulate(sizes)][:-1],
        sizes,
        labels,
        splits if any(splits) else [],
        weights,
        groups,
        classes=list(layout.names),
    )
