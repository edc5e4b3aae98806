"""Images in shards, on this machine or behind URLs: tars in the WebDataset layout, and Parquet files.

Each shard is read through once and its index kept, so that any image can be read alone afterwards: a shard is fetched
whole when the first of its images is wanted, and leaves the disk again when others need the room. What training asks of
a file of Parquet, images in any order, its row groups cannot give; its images are laid one behind another instead.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tokenfusion.data.cache import Cache, default_cache
from tokenfusion.data.dataset import Dataset, printable, quoted
from tokenfusion.data.labels import number_labels
from tokenfusion.data.readers import ByteRanges
from tokenfusion.data.remote import THREADS, RemoteFile, download, find_files, has_ending, read_small, without_secrets
from tokenfusion.data.rows import as_groups, as_weights
from tokenfusion.data.sampler import OPEN_SHARDS
from tokenfusion.data.shard_index import INDEX_VERSION, Index, index_parquet, index_tar
from tokenfusion.data.split_names import split_in_name
from tokenfusion.errors import InputError
from tokenfusion.files import write_text
from tokenfusion.formatting import counting
from tokenfusion.recipe import Reading

ENDINGS = (".tar", ".parquet")


@dataclass(frozen=True)
class Shard:
    """The images of a file, at the offsets of its index."""

    file: RemoteFile
    cache: Cache
    size: int
    """Of its images, in bytes."""
    reading: Reading = Reading()  # noqa: RUF009 - frozen
    """How its columns are called."""

    @property
    def is_fetched(self) -> bool:
        """Whether its images must be in the cache to be read."""
        return is_parquet(self.file) or not self.file.local

    def open(self) -> BinaryIO:
        if not is_parquet(self.file):
            return open_shard(self.file, self.cache)
        room = self.size if self.file.local else self.size + self.file.size
        key = f"{self.file.key}-images{of_columns(self.reading)}"
        return self.cache.open(key, room, lambda path: unpack(self.file, self.cache, path, self.reading))

    def failure(self, reason: str) -> InputError:
        return InputError(f"{self.file.shown} {reason}; check its disk")


@dataclass(frozen=True, eq=False)
class ShardRanges(ByteRanges):
    """Image files inside shards, which are fetched whole."""

    blobs: list[Shard]

    def fetch(self, number: int) -> None:
        if self.blobs[number].is_fetched:
            self.blobs[number].open().close()

    def require_room(self) -> None:
        """Refuse a cache that does not hold the shards which are open at once, twice: those to come are fetched too.

        Raises:
            InputError: with the size that does.
        """
        sizes = [shard.file.size * (1 + is_parquet(shard.file)) for shard in self.blobs if shard.is_fetched]
        need = min(sum(sizes), 2 * OPEN_SHARDS * max(sizes, default=0))
        cache = self.blobs[0].cache
        if need > cache.limit:
            raise InputError(
                f"the cache {cache.folder} may take {cache.limit / 2**30:.3g} GiB, but training draws from "
                f"{OPEN_SHARDS} shards at a time and needs {need / 2**30:.3g}; allow that by TOKENFUSION_CACHE_GB, or "
                "pack smaller shards"
            )


def open_shards(
    data: str,
    below: list[str] | None = None,
    reading: Reading = Reading(),  # noqa: B008 - frozen
) -> Dataset:
    """Open shards given as a pattern, a folder or a single one; see `find_files`.

    What they say of an image's split goes before what their names tell.

    Raises:
        InputError: a shard is missing, damaged or cannot be reached, or an image has no label.
    """
    cache = default_cache()
    if below is not None:
        below = sorted(
            name
            for name in below
            if has_ending(name, ENDINGS) and name.count("/") < 2 and os.path.basename(name)[0] != "."
        )
    files = find_files(data, ENDINGS, below)
    indexes = list(read_indexes(files, cache, reading))
    names = [f"{file.name}/{name}" for file, index in zip(files, indexes, strict=True) for name in index.names]
    counts = [len(index.names) for index in indexes]
    numbers = np.repeat(np.arange(len(files)), counts)
    classes, labels = name_labels(data, names, indexes)
    told = [
        index.splits or [split_in_name(file.name)] * len(index.names)
        for file, index in zip(files, indexes, strict=True)
    ]
    weights = [weight for index in indexes for weight in index.weights or [None] * len(index.names)]
    groups = [group for index in indexes for group in index.groups or [""] * len(index.names)]
    return Dataset(
        where=without_secrets(data),
        names=names,
        labels=labels,
        classes=classes,
        splits=[split for splits in told for split in splits],
        weights=as_weights(without_secrets(data), names, weights),
        groups=as_groups(groups),
        reader=ShardRanges(
            blobs=[Shard(file, cache, sum(index.sizes), reading) for file, index in zip(files, indexes, strict=True)],
            numbers=numbers,
            offsets=np.array([offset for index in indexes for offset in index.offsets], dtype=np.int64),
            sizes=np.array([size for index in indexes for size in index.sizes], dtype=np.int64),
        ),
        shards=numbers,
        shard_sizes=[file.size for file in files],
        ignored=sum(index.ignored for index in indexes),
    )


def is_parquet(shard: RemoteFile) -> bool:
    return has_ending(shard.url, (".parquet",))


def open_shard(shard: RemoteFile, cache: Cache) -> BinaryIO:
    """A shard itself: in place, or from the cache, which fetches it."""
    if not shard.local:
        return cache.open(shard.key, shard.size, lambda path: download(shard, path))
    try:
        file = open(shard.url, "rb")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise InputError(f"{shard.url} cannot be read: {error.strerror}; put it back") from error
    if (size := os.fstat(file.fileno()).st_size) != shard.size:
        file.close()
        raise InputError(f"{shard.url} had {shard.size} bytes and has {size} now; put it back, or train a new run")
    return file


def of_columns(reading: Reading) -> str:
    """An ending of names in the cache by which what was read of other columns is told apart."""
    columns = (reading.image_column, reading.label_column)
    return f"-{blake2b(repr(columns).encode(), digest_size=4).hexdigest()}" if any(columns) else ""


def read_indexes(shards: list[RemoteFile], cache: Cache, reading: Reading) -> Iterator[Index]:
    """Each shard's index, as it was kept or by reading through the shard, a few at a time."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        with counting("indexing shards") as progress:
            indexes = pool.map(lambda shard: read_index(shard, cache, reading), shards)
            for done, index in enumerate(indexes, start=1):
                yield index
                progress(done, len(shards))
    finally:
        pool.shutdown(cancel_futures=True)


def read_index(shard: RemoteFile, cache: Cache, reading: Reading) -> Index:
    path = cache.folder / "indexes" / f"{shard.key}{of_columns(reading)}.json"
    with cache.lock(f"{shard.key}-index"):
        with suppress(OSError, ValueError, TypeError):
            index = Index(**json.loads(path.read_bytes()))
            if index.version == INDEX_VERSION:
                return index
        with open_shard(shard, cache) as file:
            index = index_parquet(shard.shown, file, reading) if is_parquet(shard) else index_tar(shard.shown, file)
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{path.parent}: {error.strerror}; make room there, or name another folder by TOKENFUSION_CACHE"
            ) from error
        write_text(path, json.dumps(asdict(index)))
    return index


def unpack(shard: RemoteFile, cache: Cache, path: Path, reading: Reading) -> None:
    """Write the images of a Parquet file one behind another."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tokenfusion.data.parquet import image_files
    from tokenfusion.data.parquet_layout import read_layout

    packed = path.with_name(f"{path.name}.packed")
    try:
        if shard.local:
            source = open_shard(shard, cache)
        else:
            download(shard, packed)
            source = packed.open("rb")
        with source, pq.ParquetFile(source) as table, path.open("wb") as file:
            layout = read_layout(shard.shown, table, reading)
            for group in range(table.num_row_groups):
                for value in image_files(table, group, layout.image):
                    if value.is_valid:
                        file.write(value.as_buffer())
    except pa.ArrowException as error:
        raise InputError(f"{shard.shown}: not readable as Parquet ({error}); replace it or take it away") from error
    except OSError as error:
        raise InputError(
            f"{shard.shown} cannot be laid out in {cache.folder}: {error}; check the disks, and make room"
        ) from error
    finally:
        packed.unlink(missing_ok=True)


def name_labels(data: str, names: list[str], indexes: list[Index]) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and int64 labels (N,), of texts or of integers with names in the shards or in a file beside them."""
    where = without_secrets(data)
    labels = [label for index in indexes for label in index.labels]
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        raise InputError(f"{where}: some labels are integers and others texts; write all in one way")
    named = {tuple(index.classes) for index in indexes}
    if len(named) > 1:
        raise InputError(f"{where}: the shards differ in their class names, as {' and '.join(map(str, [*named][:2]))}")
    classes = (next(iter(named), ()) or names_beside(data)) if kinds == {int} else ()
    return number_labels(where, names, labels, classes)


def names_beside(data: str) -> tuple[str, ...]:
    """Class names in `classes.txt`, a line each, or in `classes.json`, a list, in the folder of the shards."""
    folder = data[: data.index("{")] if "{" in data else data
    folder = folder.rpartition("/")[0] if "{" in data or has_ending(data, ENDINGS) else folder.rstrip("/")
    readers: dict[str, Callable[[str], Any]] = {"classes.txt": str.splitlines, "classes.json": json.loads}
    for file, parse in readers.items():
        url = f"{folder}/{file}" if folder else file
        content = read_small(url, 2**26)
        if content is None:
            continue
        try:
            names = parse(content.decode())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{without_secrets(url)}: cannot be read ({error}); give a name for each class") from error
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise InputError(f"{without_secrets(url)}: must list the class names; it holds {quoted([str(names)[:60]])}")
        return tuple(map(printable, names))
    return ()
