"""A tar of a class-folder tree, plain or compressed; nothing is extracted to the disk."""

import io
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from lzma import LZMAError
from pathlib import Path

import numpy as np

from tokenfusion.data.dataset import Dataset, printable
from tokenfusion.data.decode import is_image
from tokenfusion.data.folder import read_tree
from tokenfusion.data.ignored import NO_IMAGE, is_dropping, why_ignored
from tokenfusion.data.readers import Blob, ByteRanges, FileBlob, MemoryBlob
from tokenfusion.data.split_names import split_named
from tokenfusion.errors import InputError

MEMORY_LIMIT = 4 * 2**30
"""Most bytes of image files that are kept in memory from a compressed tar."""


LARGEST_FILE = 2**28
"""Most bytes of one image file in it."""


LONGEST_NAME = 2**20
"""Most bytes of a header that only names a file, which is read into memory whole."""
NAMES = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
"""Types of such headers."""


class Header(tarfile.TarInfo):
    """A file's header, refused where a name would fill the memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> "Header":  # where tarfile lets one in
        if self.size > LONGEST_NAME and self.type in NAMES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes, more than {LONGEST_NAME:,}, for a name")
        return super()._proc_member(tar)  # type: ignore[misc]


@dataclass
class Members:
    """What a tar holds: image files by name, each with its offset and size in bytes, and what else lies in it."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)


def open_tar(path: Path) -> Dataset:
    """Open a tar, with or without one folder around its class folders.

    A plain one is read in place; the images of a compressed one are kept in memory, one behind another.
    """
    try:
        try:
            members, blob = read_plain(path)
        except tarfile.ReadError:
            members, blob = read_compressed(path)
    except (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError) as error:
        raise InputError(f"{path}: not a tar, or a damaged one ({error}); pack it again, or unpack it") from error
    top = folder_around(members)
    files = [name.removeprefix(top) for name in sorted(members.images)]
    tree = read_tree(files, [name.removeprefix(top) for name in sorted(members.folders) if name.startswith(top)])
    tree.notes[:0] = [f"entered {printable(top[:-1])!r}, which holds everything"] * bool(top)
    tree.ignored |= {name.removeprefix(top): why_ignored(name) or NO_IMAGE for name in members.others}
    places = np.array([members.images[top + file] for file in tree.files], dtype=np.int64).reshape(-1, 2)
    reader = ByteRanges([blob], np.zeros(len(places), dtype=np.int64), places[:, 0], places[:, 1])
    return Dataset(where=str(path), **tree.index(), reader=reader)


def read_plain(path: Path) -> tuple[Members, Blob]:
    with tarfile.open(path, "r:", tarinfo=Header) as tar:
        members = read_members(tar, lambda member: member.offset_data)
        refuse_damage(path, tar)
    return members, FileBlob(path)


def read_compressed(path: Path) -> tuple[Members, Blob]:
    data = io.BytesIO()

    def keep(member: tarfile.TarInfo) -> int:
        offset = data.tell()
        if offset + member.size > MEMORY_LIMIT:
            raise InputError(
                f"{path}: its images are more than {MEMORY_LIMIT / 2**30:g} GiB, the most that is kept in memory; "
                "decompress it to a plain .tar, which is read in place"
            )
        if member.size > LARGEST_FILE:
            raise InputError(
                f"{path}: {member.name} has {member.size:,} bytes, more than {LARGEST_FILE:,}; leave it out"
            )
        file = tar.extractfile(member)
        assert file is not None
        data.write(file.read())
        return offset

    with tarfile.open(path, "r|*", tarinfo=Header) as tar:
        members = read_members(tar, keep)
    return members, MemoryBlob(data.getvalue())


def read_members(tar: tarfile.TarFile, place: Callable[[tarfile.TarInfo], int]) -> Members:
    """Go through a tar once; `place` gives the offset at which a member's bytes are found later."""
    members = Members()
    for member in tar:
        name, target = (os.path.normpath(text).lstrip("/") for text in (member.name, member.linkname))
        if member.isdir():
            members.folders.add(name)
        elif is_image(name) and member.isreg() and not member.issparse():
            members.images[name] = (place(member), member.size)
        elif is_image(name) and member.islnk() and target in members.images:
            members.images[name] = members.images[target]
        else:
            members.others.append(name)
    for name in members.images:  # a tar need not list its folders: a/b/c.png lies in a and a/b
        parts = name.split("/")
        members.folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    members.folders.discard(".")
    return members


def folder_around(members: Members) -> str:
    """The one folder that lies around everything, with a slash; empty where there is none, or it is a split."""
    tops = {top for name in (*members.images, *members.folders) if not is_dropping(top := name.split("/")[0])}
    nested = len(tops) == 1 and any(name.count("/") > 1 for name in members.images)
    top = min(tops) if nested else ""
    return "" if not nested or split_named(top) else f"{top}/"


def refuse_damage(path: Path | str, tar: tarfile.TarFile) -> None:
    """A tar ends with a block of zeros; where anything else stopped the reading, files would be lost silently."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise InputError(
            f"{path}: damaged at byte {tar.offset}, where a file's header or the end must be; pack it again"
        )
