"""Labelled images, wherever they lie."""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tokenfusion.data.decode import decode_image
from tokenfusion.errors import InputError
from tokenfusion.formatting import counted

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What data calls its parts, in lower case, and what they are called here."""

KINDS = (
    "a folder with a subfolder per class, Parquet files in the Hugging Face image layout, a CSV or JSONL with "
    "path and label (or labels), a tar of a class-folder tree, shards by pattern or URL, or the name digits"
)


@dataclass(eq=False, kw_only=True)
class Dataset(ABC):
    """Labelled images that can be decoded one by one, in any order and from any thread or process.

    Raises:
        InputError: there is no image, two classes have one name, some images name a split and others do not,
            or held-out images have a label that the training images lack.
    """

    where: str
    """DATA as it was given, for messages."""
    classes: tuple[str, ...]
    """Names of the classes; a label is an index into them."""
    names: list[str]
    """What a person knows each image by: its path relative to DATA, or `train.parquet:123`."""
    labels: np.ndarray
    """int64 (N,); of multi-label data bool (N, K): whether an image has each class."""
    splits: list[str]
    """For each image `train`, `val`, `test`, or `""` when the data does not say."""
    ignored: int = 0
    """Files that lie in the data but are no images by their name, or lie outside every class."""
    first_ignored: tuple[str, ...] = ()
    """Names of a few of them."""
    weights: np.ndarray | None = None
    """float64 (N,), above 0: how much each image's loss counts; None where the data does not say."""

    def __post_init__(self) -> None:
        if not self.names:
            ignored = f", {self.ignored_in_words()}" * bool(self.ignored)
            raise InputError(f"{self.where}: no image found{ignored}; give {KINDS}")
        self.refuse_equal_classes()
        self.refuse_half_split()
        self.refuse_unknown_labels()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def multi_label(self) -> bool:
        """Whether an image has any number of classes rather than one."""
        return self.labels.ndim == 2

    def ignored_in_words(self) -> str:
        """How many files are ignored, and the names of a few."""
        more = self.ignored - len(self.first_ignored)
        names = quoted(self.first_ignored) + f" and {more:,} more" * bool(more)
        return f"{counted(self.ignored, 'other file')} ignored" + f" ({names})" * bool(self.first_ignored)

    def label_text(self, index: int) -> str:
        """An image's class, or its classes with `|` between them."""
        if self.multi_label:
            return "|".join(self.classes[label] for label in np.flatnonzero(self.labels[index]))
        return self.classes[self.labels[index]]

    @abstractmethod
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

    @property
    def shard_numbers(self) -> np.ndarray | None:
        """int64 (N,): the shard that each image lies in; None where images can be had in any order at the same cost."""
        return None

    @property
    def shard_sizes(self) -> list[int] | None:
        """Bytes of each shard, by which one that has changed is noticed."""
        return None

    def fetch(self, number: int) -> None:  # noqa: B027 - most kinds have no shards
        """Have the images of a shard on this machine, so that decoding one does not wait."""

    def require_room(self) -> None:  # noqa: B027 - most kinds need none
        """Refuse to train where images must be kept on this machine and there is no room for them."""

    def refuse_equal_classes(self) -> None:
        twice = [name for name, count in Counter(self.classes).items() if count > 1]
        if twice:
            raise InputError(f"{self.where}: several classes are called {quoted(twice)}; give each its own name")

    def refuse_half_split(self) -> None:
        if "" in self.splits and any(self.splits):
            name = self.names[self.splits.index("")]
            raise InputError(f"{self.where}: {name!r} is in no split while others are; name one for all images or none")

    def refuse_unknown_labels(self) -> None:
        """Refuse held-out images of a class without training images."""
        splits = np.array(self.splits)
        known = classes_in(self.labels[splits == "train"])
        for split in ("val", "test"):
            unknown = classes_in(self.labels[splits == split]) - known
            if known and unknown:
                names = quoted(self.classes[label] for label in sorted(unknown))
                raise InputError(
                    f"{self.where}: {split} has labels that train lacks: {names}; "
                    f"add training images of them or take them out of {split}"
                )


class Files(Dataset):
    """Images that are files, in whatever container: what is left to say is how to get at the bytes."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of one image file; raises UnreadableImage when they cannot be had."""

    def decode(self, index: int, max_pixels: int) -> Tensor:
        return decode_image(self.read(index), max_pixels=max_pixels)


def classes_in(labels: np.ndarray) -> set[int]:
    """The classes that some image has, of labels int64 (N,) or bool (N, K)."""
    return set((np.flatnonzero(labels.any(0)) if labels.ndim == 2 else np.unique(labels)).tolist())


def held_out_name(source: Dataset) -> str | None:
    """The split that training is judged on: `val` if the data has one, else `test`, else None."""
    return next((name for name in ("val", "test") if name in source.splits), None)


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
