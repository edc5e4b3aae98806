"""Images in shards, on this machine or behind URLs: tars in the WebDataset layout, and Parquet files.

Each shard is read through once and its index kept, so that any image can be read alone afterwards: a shard is fetched
whole when the first of its images is wanted, and leaves the disk again when others need the room. What training asks of
a file of Parquet, images in any order, its row groups cannot give; its images are laid one behind another instead.
"""

import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tokenfusion.data.dataset import Dataset, Files, printable, quoted
from tokenfusion.data.decode import EXTENSIONS, UnreadableImage
from tokenfusion.data.readers import MAX_FILE_BYTES
from tokenfusion.data.remote import (
    THREADS,
    Cache,
    RemoteFile,
    default_cache,
    download,
    find_files,
    path_of,
    read_small,
    without_secrets,
)
from tokenfusion.data.sampler import OPEN_SHARDS
from tokenfusion.data.trees import refuse_damage
from tokenfusion.errors import InputError
from tokenfusion.files import write_text

ENDINGS = (".tar", ".parquet")
MAX_LABEL_BYTES = 2**20
INDEX_VERSION = 1


@dataclass
class Index:
    """What is known of a shard's images, one entry each."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Where each image file begins, in bytes: in the tar, or among the Parquet file's images one behind another."""
    sizes: list[int] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    """Names of integer labels, where the shard has them."""
    ignored: int = 0
    version: int = INDEX_VERSION


@dataclass(eq=False, kw_only=True)
class Shards(Files):
    """Image files inside shards."""

    shards: list[RemoteFile]
    starts: list[int]
    """Index of each shard's first image."""
    offsets: np.ndarray
    """int64 (N,), in bytes."""
    sizes: np.ndarray
    """int64 (N,), in bytes."""
    cache: Cache

    @property
    def shard_numbers(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.shards)), np.diff([*self.starts, len(self)]))

    @property
    def shard_sizes(self) -> list[int]:
        return [shard.size for shard in self.shards]

    def read(self, index: int) -> bytes:
        number = bisect_right(self.starts, index) - 1
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        if size > MAX_FILE_BYTES:
            raise UnreadableImage(f"the file has {size} bytes, more than {MAX_FILE_BYTES}")
        try:
            with self.open(number) as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise InputError(
                f"{self.shards[number].shown} cannot be read: {error}; check its disk, then --resume"
            ) from error
        if len(data) < size:
            raise InputError(f"{self.shards[number].shown} ends after {len(data)} of the {size} bytes of an image")
        return data

    def open(self, number: int) -> BinaryIO:
        """A shard's images, at their offsets."""
        shard = self.shards[number]
        if not is_parquet(shard):
            return open_shard(shard, self.cache)
        end = self.starts[number + 1] if number + 1 < len(self.shards) else len(self)
        images = int(self.sizes[self.starts[number] : end].sum())
        room = images if shard.local else images + shard.size
        return self.cache.open(f"{shard.key}-images", room, lambda path: unpack(shard, self.cache, path))

    def fetch(self, number: int) -> None:
        """Have a shard in the cache."""
        if is_parquet(self.shards[number]) or not self.shards[number].local:
            self.open(number).close()

    def require_room(self) -> None:
        """Refuse a cache that does not hold the shards which are open at once, twice: those to come are fetched too.

        Raises:
            InputError: with the size that does.
        """
        fetched = [shard for shard in self.shards if is_parquet(shard) or not shard.local]
        sizes = [shard.size * (2 if is_parquet(shard) else 1) for shard in fetched]
        need = min(sum(sizes), 2 * OPEN_SHARDS * max(sizes, default=0))
        if need > self.cache.limit:
            raise InputError(
                f"the cache {self.cache.folder} may take {self.cache.limit / 2**30:.3g} GiB, but training draws from "
                f"{OPEN_SHARDS} shards at a time and needs {need / 2**30:.3g}; allow that by TOKENFUSION_CACHE_GB, or "
                "pack smaller shards"
            )


def open_shards(data: str) -> Dataset:
    """Open shards given as a pattern, a folder or a single one; see `find_files`. Their names tell the splits.

    Raises:
        InputError: a shard is missing, damaged or cannot be reached, or an image has no label.
    """
    from tokenfusion.data.parquet import split_of

    cache = default_cache()
    shards = find_files(data, ENDINGS)
    indexes = list(read_indexes(shards, cache))
    classes, labels = read_labels(data, shards, indexes)
    counts = [len(index.names) for index in indexes]
    return Shards(
        where=without_secrets(data),
        classes=classes,
        names=[f"{shard.name}/{name}" for shard, index in zip(shards, indexes, strict=True) for name in index.names],
        labels=labels,
        splits=[split_of(shard.name) for shard, count in zip(shards, counts, strict=True) for _ in range(count)],
        ignored=sum(index.ignored for index in indexes),
        shards=shards,
        starts=np.cumsum([0, *counts])[:-1].tolist(),
        offsets=np.array([offset for index in indexes for offset in index.offsets], dtype=np.int64),
        sizes=np.array([size for index in indexes for size in index.sizes], dtype=np.int64),
        cache=cache,
    )


def names_shards(data: str) -> bool:
    """Whether DATA is a URL or a pattern in braces; a path that exists is neither."""
    return "://" in data or ("{" in data and not os.path.exists(data))


def is_parquet(shard: RemoteFile) -> bool:
    return path_of(shard.url).endswith(".parquet")


def open_shard(shard: RemoteFile, cache: Cache) -> BinaryIO:
    """A shard itself: in place, or from the cache, which fetches it."""
    if not shard.local:
        return cache.open(shard.key, shard.size, lambda path: download(shard, path))
    try:
        file = open(shard.url, "rb")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise InputError(f"{shard.url} cannot be read: {error.strerror}; put it back, then --resume") from error
    if (size := os.fstat(file.fileno()).st_size) != shard.size:
        file.close()
        raise InputError(f"{shard.url} had {shard.size} bytes and has {size} now; put it back, or train a new run")
    return file


def read_indexes(shards: list[RemoteFile], cache: Cache) -> Iterator[Index]:
    """Each shard's index, as it was kept or by reading through the shard, a few at a time."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    pool = ThreadPoolExecutor(THREADS)
    try:
        indexes = pool.map(lambda shard: read_index(shard, cache), shards)
        silent = len(shards) < 2 or not console.is_terminal
        yield from track(indexes, "indexing shards", len(shards), console=console, transient=True, disable=silent)
    finally:
        pool.shutdown(cancel_futures=True)


def read_index(shard: RemoteFile, cache: Cache) -> Index:
    path = cache.folder / "indexes" / f"{shard.key}.json"
    with cache.lock(f"{shard.key}-index"):
        with suppress(OSError, ValueError, TypeError):
            index = Index(**json.loads(path.read_bytes()))
            if index.version == INDEX_VERSION:
                return index
        with open_shard(shard, cache) as file:
            index = (index_parquet if is_parquet(shard) else index_tar)(shard.shown, file)
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{path.parent}: {error.strerror}; make room there, or name another folder by TOKENFUSION_CACHE"
            ) from error
        write_text(path, json.dumps(asdict(index)))
    return index


def index_tar(name: str, file: BinaryIO) -> Index:
    """Go through the headers of a tar of `key.jpg` with `key.cls`, or with `key.json` that has a `label`.

    Source: github.com/webdataset/webdataset. A key ends at the first dot behind its last slash.
    """
    index = Index()
    labels: dict[str, int | str] = {}
    images: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
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
                    label = label_of(f"{name}/{member.name}", read_member(name, tar, member), ending)
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
    except ValueError as error:
        raise InputError(f"{name}: not readable as {'text' if ending == '.cls' else 'JSON'} ({error})") from error
    label = value.get("label") if isinstance(value, dict) else None
    if label is None or (isinstance(label, int | str) and not isinstance(label, bool)):
        return label
    raise InputError(f"{name}: label {label!r} is neither an integer nor a text")


def is_webdataset(path: Path) -> bool:
    """Whether a tar's first files are images with labels beside them, rather than class folders."""
    try:
        with tarfile.open(path, "r:") as tar:
            files = [split_name(member.name) for member, _ in zip(tar, range(16), strict=False) if member.isreg()]
    except (tarfile.TarError, OSError):
        return False
    images = {key for key, ending in files if ending in EXTENSIONS}
    return any(key in images and ending in (".cls", ".json") for key, ending in files)


def index_parquet(name: str, file: BinaryIO) -> Index:
    """Read through a Parquet file, a row group at a time."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from tokenfusion.data.parquet import image_files, read_layout

    index = Index()
    try:
        with pq.ParquetFile(file) as table:
            layout = read_layout(name, table.schema_arrow)
            for group in range(table.num_row_groups):
                lengths = pc.binary_length(image_files(table, group, layout.image)).fill_null(0)
                index.sizes += lengths.to_pylist()
                labels = table.read_row_group(group, columns=[layout.label], use_threads=False)[layout.label]
                if labels.null_count:
                    raise InputError(f"{name}: an image of row group {group} has no label; every image needs one")
                index.labels += labels.cast(layout.kind).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: not readable as Parquet ({error}); replace it or take it away") from error
    index.classes = list(layout.names)
    index.names = [str(row) for row in range(len(index.sizes))]
    index.offsets = np.cumsum([0, *index.sizes])[:-1].tolist()
    return index


def unpack(shard: RemoteFile, cache: Cache, path: Path) -> None:
    """Write the images of a Parquet file one behind another."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tokenfusion.data.parquet import image_files, read_layout

    packed = path.with_name(f"{path.name}.packed")
    try:
        if shard.local:
            source = open_shard(shard, cache)
        else:
            download(shard, packed)
            source = packed.open("rb")
        with source, pq.ParquetFile(source) as table, path.open("wb") as file:
            layout = read_layout(shard.shown, table.schema_arrow)
            for group in range(table.num_row_groups):
                for value in image_files(table, group, layout.image):
                    if value.is_valid:
                        file.write(value.as_buffer())
    except pa.ArrowException as error:
        raise InputError(f"{shard.shown}: not readable as Parquet ({error}); replace it or take it away") from error
    except OSError as error:
        raise InputError(
            f"{shard.shown} cannot be laid out in {cache.folder}: {error}; check the disks, make room, --resume"
        ) from error
    finally:
        packed.unlink(missing_ok=True)


def read_labels(data: str, shards: list[RemoteFile], indexes: list[Index]) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and int64 labels (N,), of texts or of integers with names in the shards or in a file beside them."""
    where = without_secrets(data)
    labels = [label for index in indexes for label in index.labels]
    distinct = set(labels)
    if len({type(label) for label in distinct}) > 1:
        raise InputError(f"{where}: some labels are integers and others texts; write all in one way")
    named = {tuple(index.classes) for index in indexes}
    if len(named) > 1:
        raise InputError(f"{where}: the shards differ in their class names; those of {shards[0].name!r} are others")
    numbers = all(isinstance(label, int) for label in distinct)
    names = (next(iter(named), ()) or names_beside(data)) if numbers else ()
    if not names:
        order = sorted(distinct)
        place = {label: number for number, label in enumerate(order)}
        return tuple(printable(str(label)) for label in order), np.array([place[label] for label in labels], np.int64)
    outside = [label for label in distinct if not 0 <= int(label) < len(names)]
    if outside:
        raise InputError(f"{where}: label {min(outside)} is none of the {len(names)} class names; add its name")
    return names, np.array(labels, dtype=np.int64)


def names_beside(data: str) -> tuple[str, ...]:
    """Class names in `classes.txt`, a line each, or in `classes.json`, a list, in the folder of the shards."""
    folder = data[: data.index("{")] if "{" in data else data
    folder = folder.rpartition("/")[0] if "{" in data or path_of(data).endswith(ENDINGS) else folder.rstrip("/")
    readers: dict[str, Callable[[str], Any]] = {"classes.txt": str.splitlines, "classes.json": json.loads}
    for file, parse in readers.items():
        url = f"{folder}/{file}" if folder else file
        content = read_small(url, 2**26)
        if content is None:
            continue
        try:
            names = parse(content.decode())
        except ValueError as error:
            raise InputError(f"{without_secrets(url)}: cannot be read ({error}); give a name for each class") from error
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise InputError(f"{without_secrets(url)}: must list the class names; it holds {quoted([str(names)[:60]])}")
        return tuple(map(printable, names))
    return ()
