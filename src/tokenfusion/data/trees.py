"""A subfolder per class, on disk or in a tar."""

import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from lzma import LZMAError
from pathlib import Path
from typing import Any

import numpy as np

from tokenfusion.data.dataset import SPLITS, Dataset, Files, describe_ignored, printable
from tokenfusion.data.decode import UnreadableImage, is_image
from tokenfusion.data.readers import MAX_FILE_BYTES, read_file
from tokenfusion.errors import InputError
from tokenfusion.formatting import counted

MEMORY_LIMIT = 4 * 2**30
"""Most bytes of image files that are kept in memory from a compressed tar."""


@dataclass(eq=False, kw_only=True)
class Folder(Files):
    """Image files on disk."""

    root: Path
    paths: list[str]
    """Relative to root, as the file system has them."""

    def read(self, index: int) -> bytes:
        return read_file(os.path.join(self.root, self.paths[index]))


@dataclass(eq=False, kw_only=True)
class Tar(Files):
    """Image files inside a tar that stays packed; each is read from its place."""

    archive: Path
    offsets: np.ndarray
    """int64 (N,), in bytes."""
    sizes: np.ndarray
    """int64 (N,), in bytes."""

    def read(self, index: int) -> bytes:
        size = int(self.sizes[index])
        if size > MAX_FILE_BYTES:
            raise UnreadableImage(f"the file has {size} bytes, more than {MAX_FILE_BYTES}")
        try:
            with open(self.archive, "rb") as file:
                file.seek(int(self.offsets[index]))
                data = file.read(size)
        except OSError as error:
            raise UnreadableImage(f"the tar cannot be read: {error.strerror}") from error
        if len(data) < size:
            raise UnreadableImage(f"the tar ends inside it, after {len(data)} of {size} bytes")
        return data


@dataclass(eq=False, kw_only=True)
class CompressedTar(Files):
    """Image files that were in a compressed tar, kept in memory one behind another."""

    data: bytearray
    offsets: np.ndarray
    sizes: np.ndarray

    def read(self, index: int) -> bytes:
        start = int(self.offsets[index])
        return bytes(memoryview(self.data)[start : start + int(self.sizes[index])])


@dataclass
class Tree:
    """What a tree of class folders says about its files."""

    classes: tuple[str, ...] = ()
    files: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def as_source(self, where: Path) -> dict[str, Any]:
        """The arguments that every kind of Dataset takes."""
        return {
            "where": str(where),
            "classes": tuple(map(printable, self.classes)),
            "names": [printable(file) for file in self.files],
            "labels": np.array(self.labels, dtype=np.int64),
            "splits": self.splits,
            **describe_ignored(self.ignored),
        }


def open_folder(root: Path, files: list[str], folders: list[str]) -> Dataset:
    """Open a folder whose files and folders, relative to it, are known from `walk`."""
    tree = read_tree(files, folders)
    loose = sum("/" not in file and is_image(file) for file in files)
    if loose and not tree.files:
        raise InputError(
            f"{root}: {counted(loose, 'image')} directly in it, without a class folder; "
            f"did you mean its parent {root.resolve().parent}, or a CSV that labels them?"
        )
    return Folder(**tree.as_source(root), root=root, paths=tree.files)


def read_tree(files: list[str], folders: list[str]) -> Tree:
    """Find the classes in a tree of `class/…/file` or `split/class/…/file`.

    Hidden files, files without an image's extension and files outside every class are ignored.
    """
    depth = 1 if has_splits(folders) else 0  # how deep the class folders lie

    def part(path: list[str]) -> str | None:
        return SPLITS.get(path[0].lower()) if depth else ""

    places = [folder.split("/") for folder in folders]
    tops = [place for place in places if len(place) == depth + 1 and part(place) is not None and not is_hidden(place)]
    tree = Tree(classes=tuple(sorted({place[depth] for place in tops})))
    label = {name: index for index, name in enumerate(tree.classes)}
    for file in files:
        place = file.split("/")
        split = part(place)
        if split is None or len(place) < depth + 2 or is_hidden(place) or not is_image(file):
            tree.ignored.append(file)
            continue
        tree.files.append(file)
        tree.labels.append(label[place[depth]])
        tree.splits.append(split)
    return tree


def has_splits(folders: list[str]) -> bool:
    """Whether the top folders are parts of the data, not classes: they have such names, and hold folders themselves."""
    tops = {folder for folder in folders if "/" not in folder and not is_hidden([folder])}
    parents = {folder.split("/")[0] for folder in folders if "/" in folder}
    parts = {top for top in tops & parents if top.lower() in SPLITS}
    return "train" in {part.lower() for part in parts} or (bool(parts) and parts == tops)


def is_hidden(place: list[str]) -> bool:
    return any(name.startswith(".") for name in place)


def walk(root: Path) -> tuple[list[str], list[str]]:
    """All files and folders below `root`, as sorted paths relative to it; hidden folders are left out.

    Links are followed, but never into a folder that leads to where the walk is: such a link would not end.
    """
    files: list[str] = []
    folders: list[str] = []

    def visit(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            if not is_folder(entry):
                files.append(prefix + entry.name)
            elif not entry.name.startswith(".") and (here := identity(entry.path)) not in above:
                folders.append(prefix + entry.name)
                visit(entry.path, f"{prefix}{entry.name}/", above | {here})

    try:
        visit(str(root), "", frozenset(identity(folder) for folder in (root.resolve(), *root.resolve().parents)))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error
    return files, folders


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself is no folder; as an image it will be found unreadable
        return False


def identity(folder: str | Path) -> tuple[int, int]:
    """What two paths to the same folder have in common."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def open_tar(path: Path) -> Dataset:
    """Open a tar of a class-folder tree, with or without one folder around it; nothing is extracted to the disk."""
    try:
        try:
            return open_plain_tar(path)
        except tarfile.ReadError:
            return open_compressed_tar(path)
    except (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError) as error:
        raise InputError(f"{path}: not a tar, or a damaged one ({error}); pack it again, or unpack it") from error


def open_plain_tar(path: Path) -> Dataset:
    with tarfile.open(path, "r:") as tar:
        members = read_members(tar, lambda member: member.offset_data)
        refuse_damage(path, tar)
    return Tar(**members.as_source(path), archive=path)


def open_compressed_tar(path: Path) -> Dataset:
    data = bytearray()

    def keep(member: tarfile.TarInfo) -> int:
        offset = len(data)
        if offset + member.size > MEMORY_LIMIT:
            raise InputError(
                f"{path}: its images are more than {MEMORY_LIMIT / 2**30:g} GiB, the most that is kept in memory; "
                "decompress it to a plain .tar, which is read in place"
            )
        file = tar.extractfile(member)
        assert file is not None
        data.extend(file.read())
        return offset

    with tarfile.open(path, "r|*") as tar:
        members = read_members(tar, keep)
    return CompressedTar(**members.as_source(path), data=data)


@dataclass
class Members:
    """The image files of a tar by name, each with its offset and size in bytes, and what else lies in it."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)

    def as_source(self, where: Path) -> dict[str, Any]:
        """The arguments of Tar and CompressedTar but one. A single folder around everything is left off the names."""
        files = sorted(self.places)
        folders = sorted(self.folders.union(*map(parents, files)))
        tops = {name.split("/")[0] for name in (*files, *folders)}
        top = f"{min(tops)}/" if len(tops) == 1 and any(file.count("/") > 1 for file in files) else ""
        if top[:-1].lower() in SPLITS:
            top = ""
        inner = [name.removeprefix(top) for name in folders if name.startswith(top)]
        tree = read_tree([file.removeprefix(top) for file in files], inner)
        tree.ignored += self.others
        places = np.array([self.places[top + file] for file in tree.files], dtype=np.int64).reshape(-1, 2)
        return {**tree.as_source(where), "offsets": places[:, 0], "sizes": places[:, 1]}


def read_members(tar: tarfile.TarFile, place: Callable[[tarfile.TarInfo], int]) -> Members:
    """Go through a tar once; `place` gives the offset at which a member's bytes are found later."""
    members = Members()
    for member in tar:
        name, target = (os.path.normpath(text).lstrip("/") for text in (member.name, member.linkname))
        if member.isdir():
            members.folders.add(name)
        elif not is_image(name):
            members.others.append(name)
        elif member.isreg() and not member.issparse():
            members.places[name] = (place(member), member.size)
        elif member.islnk() and target in members.places:
            members.places[name] = members.places[target]
        else:
            members.others.append(name)
    members.folders.discard(".")
    return members


def parents(file: str) -> list[str]:
    """`a/b/c.png` lies in `a` and `a/b`; a tar need not list its folders."""
    parts = file.split("/")[:-1]
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]


def refuse_damage(path: Path | str, tar: tarfile.TarFile) -> None:
    """A tar ends with a block of zeros; where anything else stopped the reading, files would be lost silently."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise InputError(
            f"{path}: damaged at byte {tar.offset}, where a file's header or the end must be; pack it again"
        )
