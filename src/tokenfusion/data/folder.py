"""A subfolder per class, below folders of splits or above them, or without any."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokenfusion.data.dataset import Dataset, printable, quoted
from tokenfusion.data.ignored import OUTSIDE, describe_ignored, is_dropping, why_ignored
from tokenfusion.data.kinds import LIST_ENDINGS
from tokenfusion.data.labels import clean_label
from tokenfusion.data.readers import Paths
from tokenfusion.data.split_names import begins_as_split, splits_in_words, splits_named
from tokenfusion.errors import InputError
from tokenfusion.formatting import counted

LOOKED_AT = 2**14
"""Bytes of a list by which it is told whether it names images."""


@dataclass
class Tree:
    """What a tree of class folders says about its files."""

    classes: tuple[str, ...] = ()
    files: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    """Other files, and why."""
    notes: list[str] = field(default_factory=list)
    """How the folders were understood, a line each."""

    def index(self) -> dict[str, Any]:
        """What a Dataset takes besides its place and its reader."""
        return {
            "names": [printable(file) for file in self.files],
            "labels": np.array(self.labels, dtype=np.int64),
            "classes": self.classes,
            "splits": self.splits,
            "notes": tuple(self.notes),
            **describe_ignored(self.ignored),
        }


@dataclass(frozen=True)
class Plan:
    """Where in `a/b/c/photo.jpg` the class and the split stand, from 0."""

    top: tuple[str, ...] = ()
    """Folders around everything, which say nothing."""
    split: int | None = None
    label: int = 0
    names: Mapping[str, str] = field(default_factory=dict)
    """The splits that folders name."""

    def places(self, place: list[str]) -> tuple[str, str] | None:
        """A file's split and class by their folders' names, None where it lies outside; "" stands for no split."""
        least = max(self.label, -1 if self.split is None else self.split)
        if tuple(place[: len(self.top)]) != self.top or len(place) < least + 2:
            return None
        return "" if self.split is None else place[self.split], place[self.label]


def open_folder(root: Path, files: list[str], tree: Tree) -> Dataset:
    """Open a folder whose files, relative to it, are known from `walk`, and their classes from `read_tree`."""
    if not tree.files:
        refuse_without_classes(root, files)
    tree.notes += warn_of_lists(root, files, tree)
    return Dataset(where=str(root), **tree.index(), reader=Paths(root, tree.files))


def warn_of_lists(root: Path, files: list[str], tree: Tree) -> list[str]:
    """A warning of a list beside the folders that names most of some images, and none of their folders: it may be what
    labels them."""
    names = [file for file in files if "/" not in file and file.lower().endswith(LIST_ENDINGS) and file[0] != "."]
    stems = {Path(image).stem for image in tree.files} if names else set()
    suspects = []
    for name in names:
        with suppress(OSError), open(root / name, "rb") as opened:
            lines = opened.read(LOOKED_AT).decode(errors="replace").splitlines()
            words = [set(re.split(r"[\s,;|\"'/\\]+", line)) for line in lines]
            hits = sum(any(Path(word).stem in stems for word in some) for some in words)
            if 2 * hits >= max(len(lines), 2) and not set().union(*words) & set(tree.classes):
                suspects.append(name)
    return [
        f"warning: {quoted(suspects[:3])} names these images, and is not read; if it labels them, give it in place of "
        "the folder"
    ] * bool(suspects)


def refuse_without_classes(root: Path, files: list[str]) -> None:
    """Refuse images that lie in no class folder, InputError."""
    images = [file for file in files if not why_ignored(file)]
    loose = [file for file in images if "/" not in file]
    lists = [file for file in files if "/" not in file and file.lower().endswith((".csv", ".tsv", ".txt", ".jsonl"))]
    listed = f"{root / lists[0]}, if that labels them" if lists else "a CSV that labels them"
    if loose:
        above, classless = (
            root.resolve().parent,
            f"{counted(len(loose), 'image')} directly in it, without a class folder",
        )
        if holds_classes(above, root):
            raise InputError(f"{root}: {classless}; give its parent {above}, of which it is a class, or {listed}")
        raise InputError(
            f"{root}: {classless}; put the images of each class into a folder of its own, such as "
            f"{root / 'cat' / loose[0]}, or give {listed}"
        )
    if images:
        raise InputError(
            f"{root}: {counted(len(images), 'image')} in it, but none in a class folder inside a split, as "
            f"{images[0]!r} shows; make a folder per class in each split, or give {listed}"
        )


def holds_classes(folder: Path, one: Path) -> bool:
    """Whether all other folders beside one hold images, and there is one: folders that hold other things, such as runs
    and documents, show that what lies here is no class of something."""
    try:
        others = [path for path in folder.iterdir() if path.is_dir() and not is_dropping(path.name)]
        held = [[file.name for file in other.iterdir()] for other in others if not other.samefile(one)]
    except OSError:
        return False
    images = [sum(not why_ignored(name) for name in names) for names in held]
    return bool(held) and all(2 * count > len(names) for count, names in zip(images, held, strict=True))


def read_tree(files: list[str], folders: list[str]) -> Tree:
    """Find the classes in a tree of `class/…/file`, `split/class/…/file` or `class/split/…/file`.

    Folders around all of it are entered. Hidden files, droppings of systems, files without an image's extension and
    files outside every class are ignored.
    """
    reasons = {file: why_ignored(file) for file in files}
    images = [file.split("/") for file in files if not reasons[file]]
    tree = Tree()
    plan = understand(images, tree)
    label_of: dict[str, str] = {}
    for file in files:
        place = file.split("/")
        found = None if reasons[file] else plan.places(place)
        split = "" if found is None else plan.names.get(found[0], "")
        if found is None or (plan.split is not None and not split):
            tree.ignored[file] = reasons[file] or OUTSIDE
            continue
        label_of[file] = clean_label(found[1])
        tree.files.append(file)
        tree.splits.append(split)
    tree.classes = tuple(sorted(set(label_of.values())))
    number = {name: index for index, name in enumerate(tree.classes)}
    tree.labels = [number[label_of[file]] for file in tree.files]
    if plan.split is not None:
        told = [printable(file.split("/")[plan.split]) for file in tree.files]
        tree.notes.append(splits_in_words(zip(told, tree.splits, strict=True)))
    note_empty(tree, plan, folders)
    return tree


def understand(images: list[list[str]], tree: Tree) -> Plan:
    """Where classes and splits stand, by the folders that hold images; notes what was guessed.

    Args:
        images: paths of image files, in parts.
        tree: to note in.
    """
    top: tuple[str, ...] = ()
    while True:
        inside = [place for place in images if len(place) > len(top) + 1 and tuple(place[: len(top)]) == top]
        depth = len(top)
        tops = {place[depth] for place in inside}
        if names := splits_above(inside, depth, tree):
            return Plan(top, split=depth, label=enter_splits(inside, depth, names, tree), names=names)
        if names := splits_below(inside, depth):
            return Plan(top, split=depth + 1, label=depth, names=names)
        (lone,) = tops if len(tops) == 1 else ("",)
        direct = any(len(place) == depth + 2 for place in inside)
        if not lone or direct:
            warn_of_parts(inside, depth, tree)
            return Plan(top, label=depth)
        top = (*top, lone)
        note = f"entered {printable('/'.join(top))!r}, which holds everything"
        tree.notes[:] = [line for line in tree.notes if not line.startswith("entered ")] + [note]


def splits_above(images: list[list[str]], depth: int, tree: Tree) -> Mapping[str, str]:
    """The splits that the folders at a depth name, where these are parts of the data; empty where they are classes.

    They are parts where two of them or more name splits, or all do, and the folders of classes lie in one; a lone
    folder `train` beside others that hold images is a class.
    """
    tops = {place[depth] for place in images}
    deep = {place[depth] for place in images if len(place) > depth + 2}
    named = splits_named(sorted(tops))
    if not named:
        return {}
    if len(named) == len(tops) or len(set(named.values())) > 1:
        if deep & named.keys():
            return named
        if all(begins_as_split(name) for name in named):
            tree.notes.append(
                f"{quoted(sorted(named))} are taken for classes, because images lie in them without class folders; "
                "where they are splits, make a folder per class in each"
            )
            return {}
        if len(named) > 1:
            raise InputError(
                f"{quoted(sorted(named))} are names of splits, but images lie in them without class folders; "
                "make a folder per class in each, or give a CSV that labels them"
            )
        return {}
    if deep & named.keys():
        others = sorted(tops - named.keys())
        tree.notes.append(
            f"{quoted(sorted(named))} is taken for a class, because it stands beside {quoted(others[:3])}, which name "
            "no split"
        )
    return {}


def enter_splits(images: list[list[str]], depth: int, names: Mapping[str, str], tree: Tree) -> int:
    """At which depth the classes lie below splits: where each split holds one folder alone, such as `train/images/cat`
    and `val/images/cat`, these are entered."""
    named = [place for place in images if place[depth] in names and len(place) > depth + 2]
    label = depth + 1
    while True:
        below = {(place[depth], place[label]) for place in named}
        lone = len(below) == len({split for split, _ in below}) and all(len(place) > label + 2 for place in named)
        if not lone or len({place[label + 1] for place in named}) < 2:
            return label
        tree.notes.append(f"entered {quoted(sorted({printable(name) for _, name in below}))} in each split")
        label += 1


def splits_below(images: list[list[str]], depth: int) -> Mapping[str, str]:
    """The splits that lie below the classes, `cat/train/1.jpg`: every folder there names one, and there are two."""
    places = {place[depth + 1] if len(place) > depth + 2 else "" for place in images}
    names = splits_named(sorted(places))
    several = len(set(names.values())) > 1 and len({place[depth] for place in images}) > 1
    return names if several and places == names.keys() else {}


def warn_of_parts(images: list[list[str]], depth: int, tree: Tree) -> None:
    """Warn where all folders of classes hold the same folders, as `fold_1` and `fold_2` of one data set do."""
    held: dict[str, set[str]] = {}
    for place in images:
        held.setdefault(place[depth], set()).add(place[depth + 1] if len(place) > depth + 2 else "")
    first = next(iter(held.values()), set())
    if len(held) > 1 and len(first) > 1 and "" not in first and all(other == first for other in held.values()):
        tree.notes.append(
            f"warning: {quoted(sorted(held)[:3])} are taken for classes, but all hold the same folders "
            f"{quoted(sorted(first)[:3])}; where these are the classes, give one of the folders, or call them train "
            "and val"
        )


def note_empty(tree: Tree, plan: Plan, folders: list[str]) -> None:
    """Warn of class folders without an image, which are left out."""
    empty = set()
    for folder in folders:
        place = folder.split("/")
        found = plan.places([*place, ""]) if len(place) == max(plan.label, plan.split or 0) + 1 else None
        if found is None or any(map(is_dropping, place)) or (plan.split is not None and found[0] not in plan.names):
            continue
        if clean_label(found[1]) not in tree.classes:
            empty.add(clean_label(found[1]))
    for name in sorted(empty):
        tree.notes.append(f"warning: class {name!r} is left out, because its folder holds no image")
