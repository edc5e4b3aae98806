"""A subfolder per class."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokenfusion.data.dataset import SPLITS, Dataset, describe_ignored, printable
from tokenfusion.data.decode import is_image
from tokenfusion.data.readers import Paths
from tokenfusion.errors import InputError
from tokenfusion.formatting import counted


@dataclass
class Tree:
    """What a tree of class folders says about its files."""

    classes: tuple[str, ...] = ()
    files: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def index(self) -> dict[str, Any]:
        """What a Dataset takes besides its place and its reader."""
        return {
            "names": [printable(file) for file in self.files],
            "labels": np.array(self.labels, dtype=np.int64),
            "classes": tuple(map(printable, self.classes)),
            "splits": self.splits,
            **describe_ignored(self.ignored),
        }


def open_folder(root: Path, files: list[str], tree: Tree) -> Dataset:
    """Open a folder whose files, relative to it, are known from `walk`, and their classes from `read_tree`."""
    loose = sum("/" not in file and is_image(file) for file in files)
    if loose and not tree.files:
        raise InputError(
            f"{root}: {counted(loose, 'image')} directly in it, without a class folder; "
            f"did you mean its parent {root.resolve().parent}, or a CSV that labels them?"
        )
    return Dataset(where=str(root), **tree.index(), reader=Paths(root, tree.files))


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
