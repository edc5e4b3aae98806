"""A dataset: what is known of labelled images, and a reader that fetches one of them."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tokenfusion.data.decode import decode_image, refuse_large
from tokenfusion.data.readers import Reader
from tokenfusion.errors import InputError
from tokenfusion.formatting import counted

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What data calls its parts, in lower case, and what they are called here."""

KINDS = (
    "a folder with a subfolder per class, Parquet files in the Hugging Face image layout, a CSV or JSONL with "
    "path and label (or labels), a tar of a class-folder tree, shards by pattern or URL, or the name digits"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """Labelled images that can be decoded one by one, in any order and from any thread or process."""

    where: str
    """DATA as it was given, for messages."""
    names: list[str]
    """What a person knows each image by: its path relative to DATA, or `train.parquet:123`."""
    labels: np.ndarray
    """int64 (N,), indices into the classes; of multi-label data bool (N, K): whether an image has each class."""
    classes: tuple[str, ...]
    """Names of the classes."""
    splits: list[str]
    """For each image `train`, `val`, `test`, or `""` when the data does not say."""
    weights: np.ndarray | None = None
    """float64 (N,), above 0: how much each image's loss counts; None where the data does not say."""
    reader: Reader
    rows: np.ndarray | None = None
    """int64 (N,): which of the reader's images these are; None for all of them, in order."""
    shards: np.ndarray | None = None
    """int64 (N,): the shard that each image lies in; None where images can be had in any order at the same cost."""
    shard_sizes: list[int] | None = None
    """Bytes of each shard, by which one that has changed is noticed."""
    ignored: int = 0
    """Files that lie in the data but are no images by their name, or lie outside every class."""
    first_ignored: tuple[str, ...] = ()
    """Names of a few of them."""
    excluded: str = ""
    """What was left out because a list says so, in words."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def multi_label(self) -> bool:
        """Whether an image has any number of classes rather than one."""
        return self.labels.ndim == 2

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Dataset":
        """Some of the images, in the order of their indices."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            names=[self.names[index] for index in chosen],
            labels=self.labels[chosen],
            splits=[self.splits[index] for index in chosen],
            weights=None if self.weights is None else self.weights[chosen],
            rows=chosen if self.rows is None else self.rows[chosen],
            shards=None if self.shards is None else self.shards[chosen],
        )

    def read(self, index: int) -> bytes | Tensor:
        """One image's file, or its pixels where no file holds it; see `Reader.read`."""
        return self.reader.read(index if self.rows is None else int(self.rows[index]))

    def decode(self, index: int, max_pixels: int) -> Tensor:
        """Decode one image.

        Args:
            index: which one, from 0.
            max_pixels: largest height × width that is decoded.

        Returns:
            uint8 tensor (3, H, W).

        Raises:
            UnreadableImage: it is corrupt, truncated, empty, no image, gone, or too large.
        """
        content = self.read(index)
        if isinstance(content, bytes):
            return decode_image(content, max_pixels=max_pixels)
        refuse_large(content.shape[1], content.shape[2], max_pixels)
        return content

    def label_text(self, index: int) -> str:
        """An image's class, or its classes with `|` between them."""
        if self.multi_label:
            return "|".join(self.classes[label] for label in np.flatnonzero(self.labels[index]))
        return self.classes[self.labels[index]]

    def ignored_in_words(self) -> str:
        """How many files are ignored, and the names of a few."""
        more = self.ignored - len(self.first_ignored)
        names = quoted(self.first_ignored) + f" and {more:,} more" * bool(more)
        return f"{counted(self.ignored, 'other file')} ignored" + f" ({names})" * bool(self.first_ignored)


def require_usable(dataset: Dataset) -> Dataset:
    """The dataset, if it can be worked on.

    Raises:
        InputError: there is no image, two classes have one name, some images name a split and others do not,
            or held-out images have a label that the training images lack.
    """
    where = dataset.where
    if not dataset.names:
        ignored = f", {dataset.ignored_in_words()}" * bool(dataset.ignored)
        raise InputError(f"{where}: no image found{ignored}; give {KINDS}")
    twice = [name for name, count in Counter(dataset.classes).items() if count > 1]
    if twice:
        raise InputError(f"{where}: several classes are called {quoted(twice)}; give each its own name")
    if "" in dataset.splits and any(dataset.splits):
        name = dataset.names[dataset.splits.index("")]
        raise InputError(f"{where}: {name!r} is in no split while others are; name one for all images or none")
    splits = np.array(dataset.splits)
    known = classes_in(dataset.labels[splits == "train"])
    for split in ("val", "test"):
        unknown = classes_in(dataset.labels[splits == split]) - known
        if known and unknown:
            raise InputError(
                f"{where}: {split} has labels that train lacks: {quoted(dataset.classes[c] for c in sorted(unknown))}; "
                f"add training images of them or take them out of {split}"
            )
    return dataset


def number_labels(
    where: str, names: Sequence[str], labels: Sequence[int | str], classes: Sequence[str] = ()
) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and int64 labels (N,).

    Args:
        where: the data, for messages.
        names: of the images (N,), for messages.
        labels: an integer or a text for each image.
        classes: names of integer labels; without them the distinct labels, in order, are the classes.

    Raises:
        InputError: a label has no name.
    """
    if not classes:
        distinct = sorted(set(labels))
        number = {label: index for index, label in enumerate(distinct)}
        return tuple(printable(str(label)) for label in distinct), np.array([number[x] for x in labels], np.int64)
    numbers = np.array(labels, dtype=np.int64)
    outside = np.flatnonzero((numbers < 0) | (numbers >= len(classes)))
    if len(outside):
        raise InputError(
            f"{where}: {names[outside[0]]!r} has label {numbers[outside[0]]}, none of the {len(classes)} class "
            "names; add its name, or take unlabelled files away"
        )
    return tuple(classes), numbers


def classes_in(labels: np.ndarray) -> set[int]:
    """The classes that some image has, of labels int64 (N,) or bool (N, K)."""
    return set((np.flatnonzero(labels.any(0)) if labels.ndim == 2 else np.unique(labels)).tolist())


def split_in_name(name: str) -> str:
    """The split that is told by a file's name, or else in its folder's: `set-test-00000.parquet`, `val/0.parquet`."""
    for part in reversed(Path(name).parts):
        for word in re.split(r"[-._]", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return ""


def held_out_name(dataset: Dataset) -> str | None:
    """The split that training is judged on: `val` if the data has one, else `test`, else None."""
    return next((name for name in ("val", "test") if name in dataset.splits), None)


def describe_ignored(files: Iterable[str]) -> dict[str, Any]:
    """What a Dataset tells of ignored files; one of each ending in each top folder is named, hidden ones last."""
    ordered = sorted(map(printable, files), key=lambda file: os.path.basename(file).startswith("."))
    kinds: dict[tuple[str, str], str] = {}
    for file in ordered:
        top, _, below = file.partition("/")
        kinds.setdefault((top if below else "", os.path.splitext(file)[1].lower()), file)
    return {"ignored": len(ordered), "first_ignored": tuple(kinds.values())[:3]}


def printable(name: str) -> str:
    """A file's name as text that can be written as UTF-8, for a name may be any bytes."""
    return name.encode(errors="backslashreplace").decode()


def quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
