"""Images to be classified, of any place that training takes, labelled or not: in parts, each read from end to end."""

import glob
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from lzma import LZMAError
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenfusion.data.cache import default_cache
from tokenfusion.data.columns import path_column
from tokenfusion.data.dataset import KINDS, printable
from tokenfusion.data.decode import UnreadableImage, is_image
from tokenfusion.data.ignored import why_ignored
from tokenfusion.data.kinds import TAR_ENDINGS, Kind, files_below, kind_of
from tokenfusion.data.lists import METADATA
from tokenfusion.data.paths import ListedPaths, exists, resolve_paths
from tokenfusion.data.readers import read_file, refuse_pointer
from tokenfusion.data.remote import RemoteFile, find_files, has_ending, look_up
from tokenfusion.data.shards import ENDINGS, is_parquet, open_shard
from tokenfusion.data.table import read_table
from tokenfusion.data.tar import refuse_damage
from tokenfusion.errors import InputError
from tokenfusion.places import names_shards, nearest
from tokenfusion.recipe import Reading
from tokenfusion_runtime.files import MAX_FILE_BYTES, expand

NO_BYTES = "the row holds no bytes; image files must be inside the Parquet file"


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An image that is yet to be read."""

    path: str
    read: Callable[[], bytes | Tensor]
    """Its file, or its pixels, uint8 (3, H, W), where no file holds it; UnreadableImage where it cannot be had."""


@dataclass(frozen=True)
class Part:
    """Images that are read one after another: a shard's, or some of those that lie in none."""

    name: str
    """Of the file that is written of it, without its ending; no two parts of a job share one."""
    source: str
    """What a person knows it by."""
    content: str
    """Hexadecimal digits that change with what it holds."""
    images: Callable[[], Iterator[NamedImage]]
    """Raises InputError where the part, rather than one of its images, cannot be read."""
    fetch: Callable[[], object] | None = None
    """Brings it to this machine, where it lies elsewhere."""


def find_parts(sources: Sequence[str], images_per_part: int, reading: Reading = Reading()) -> list[Part]:  # noqa: B008
    """The parts of several places, always in the same order: the shards, then chunks of all other images.

    Args:
        sources: each a folder, a list, a Parquet file, a tar, shards by pattern or URL, an image file, a glob,
            `digits`, or - for a list on standard input.
        images_per_part: of the images that lie in no shard.
        reading: where a list's paths start, and which columns hold paths or images.

    Raises:
        InputError: a place does not exist or cannot be read, or there is no image.
    """
    if images_per_part < 1:
        raise InputError(f"images_per_part={images_per_part} leaves no image in a part; give 1 or more")
    shards: list[RemoteFile] = []
    loose: list[NamedImage] = []
    for source in sources:
        for place in places(source):
            found = look_into(place, reading)
            shards += found[0]
            loose += found[1]
    parts = list({part.name: part for part in (part_of_shard(shard, reading) for shard in shards)}.values())
    for number, start in enumerate(range(0, len(loose), images_per_part)):
        parts.append(part_of_images(number, loose[start : start + images_per_part]))
    if not parts:
        raise InputError(f"there is no image in {', '.join(sources)}; give {KINDS}")
    return parts


def places(source: str) -> list[str]:
    """What a word of the command stands for: itself, or what a glob finds.

    Raises:
        InputError: nothing, and it is not called like an image, which may have gone since it was listed.
    """
    if source in ("digits", "-") or names_shards(source) or os.path.lexists(source):
        return [source]
    found = sorted(glob.glob(source, recursive=True))
    if not found and not is_image(source):
        raise InputError(f"{source}: no such file or folder; {nearest(Path(source))}")
    return found or [source]


def look_into(place: str, reading: Reading) -> tuple[list[RemoteFile], list[NamedImage]]:
    """The shards of a place, or its images where it has no shards."""
    kind = kind_of(place)
    if kind is Kind.DIGITS:
        from tokenfusion.data.digits import open_digits

        digits = open_digits()
        return [], [NamedImage(name, partial(digits.read, index)) for index, name in enumerate(digits.names)]
    if kind is Kind.SHARDS:
        return find_files(place, ENDINGS), []
    if kind is Kind.FOLDER:
        return look_below(place)
    if kind in (Kind.PARQUET, Kind.TAR):
        refuse_pointer(Path(place))
        return [look_up(place, root=os.path.dirname(os.path.abspath(place)))], []
    names = names_in_list(Path(place), reading) if kind is Kind.LIST else expand([place])
    return [], [NamedImage(printable(name), partial(read_file, name)) for name in names]


def look_below(root: str) -> tuple[list[RemoteFile], list[NamedImage]]:
    """The shards below a folder, or all images."""
    files, _ = files_below(Path(root))
    images = [file for file in files if not why_ignored(file)]
    shards = [
        file
        for file in files
        if has_ending(file, ENDINGS)
        and not why_ignored(os.path.splitext(file)[0] + ".png")
        and os.path.basename(file) not in METADATA
    ]
    if images and shards:
        raise InputError(f"{root}: holds both shards ({shards[0]!r}) and images ({images[0]!r}); give one of them")
    if shards:
        return find_files(root, ENDINGS, shards), []
    paths = [os.path.join(root, file) for file in sorted(images)]
    return [], [NamedImage(printable(path), partial(read_file, path)) for path in paths]


def names_in_list(path: Path, reading: Reading) -> list[str]:
    """The image files that a list names, each once, as they can be opened from here.

    Raises:
        InputError: the list cannot be read, or most of its files do not exist.
    """
    table = read_table(path, reading.encoding)
    column = path_column(table, reading.path_column) if table.rows else ""
    root = Path(reading.root) if reading.root else path.parent
    rows = [(where, str(row.get(column) or "").strip(" ")) for where, row in table.rows]
    for where, cell in rows:
        if not cell:
            raise InputError(f"{where}: {column} is empty; every image needs a path")
    relative = [row for row in rows if reading.root or not os.path.isabs(row[1])]
    resolved = iter(resolve_paths(str(path), root, relative, bool(reading.root))[0])
    found = (
        cell if os.path.isabs(cell) and not reading.root else os.path.join(root, next(resolved)) for _, cell in rows
    )
    names = list(dict.fromkeys(found))
    missing = tuple(printable(name.removeprefix(f"{root}/")) for name in names if not exists(root, name))
    ListedPaths(root, names, str(path), missing).require_there()
    return names


def part_of_images(number: int, images: list[NamedImage]) -> Part:
    """Some of the images that lie in no shard."""
    content = digest(image.path for image in images)
    return Part(f"images-{number:05d}", f"{images[0].path} ... {images[-1].path}", content, partial(iter, images))


def part_of_shard(shard: RemoteFile, reading: Reading) -> Part:
    """A tar or a Parquet file."""
    stem = shard.name
    for ending in (".parquet", *sorted(TAR_ENDINGS, key=len, reverse=True)):
        if stem.lower().endswith(ending):
            stem = stem[: -len(ending)]
            break
    name = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', stem)[-150:]}-{digest([shard.shown])[:8]}"
    content = digest([shard.shown, shard.size, shard.version])
    read = partial(images_in_parquet, shard, reading) if is_parquet(shard) else partial(images_in_tar, shard)
    return Part(name, shard.shown, content, read, None if shard.local else partial(fetch, shard))


def digest(values: Iterator[Any] | Sequence[Any]) -> str:
    found = blake2b(digest_size=16)
    for value in values:
        found.update(repr(value).encode() + b"\n")
    return found.hexdigest()


def fetch(shard: RemoteFile) -> None:
    open_shard(shard, default_cache()).close()


def images_in_tar(shard: RemoteFile) -> Iterator[NamedImage]:
    """The image files of a tar, plain or compressed, in its order."""
    try:
        with open_shard(shard, default_cache()) as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            for member in tar:
                if why_ignored(member.name.removeprefix("./")) or not (member.isreg() or member.islnk()):
                    continue
                path = f"{shard.name}/{printable(member.name.removeprefix('./'))}"
                if member.size > MAX_FILE_BYTES:
                    too_large = UnreadableImage(f"the file has {member.size} bytes, more than {MAX_FILE_BYTES}")
                    yield NamedImage(path, partial(fail, too_large))
                    continue
                content = tar.extractfile(member)
                assert content is not None  # for what is a file
                yield NamedImage(path, partial(bytes, content.read()))
            refuse_damage(shard.shown, tar)
    except (tarfile.TarError, EOFError, OSError, KeyError, zlib.error, LZMAError) as error:
        raise InputError(
            f"{shard.shown}: not a tar, or a damaged one ({error}); pack it again, or take it away"
        ) from error


def fail(error: UnreadableImage) -> bytes:
    raise error


def images_in_parquet(shard: RemoteFile, reading: Reading) -> Iterator[NamedImage]:
    """The image files in the rows of a Parquet file, a row group in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tokenfusion.data.parquet import image_files
    from tokenfusion.data.parquet_layout import image_column, read_features

    row = 0
    try:
        with open_shard(shard, default_cache()) as file, pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            column = image_column(shard.shown, schema, read_features(schema), reading.image_column)
            for group in range(table.num_row_groups):
                for value in image_files(table, group, column):
                    yield NamedImage(f"{shard.name}:{row}", partial(bytes_in, value))
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{shard.shown}: not readable as Parquet ({error}); replace it or take it away") from error


def bytes_in(value: Any) -> bytes:
    """The image file in a cell."""
    if not value.is_valid:
        raise UnreadableImage(NO_BYTES)
    data: bytes = value.as_py()
    return data
