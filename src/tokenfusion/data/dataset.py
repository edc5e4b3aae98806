"""A dataset: what is known of labelled images, and a reader that fetches one of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from tokenfusion.data.decode import ValueRange, decode_image, refuse_large
from tokenfusion.data.readers import Reader
from tokenfusion.formatting import abridged, counted

KINDS = (
    "a folder with a subfolder per class, Parquet files in the Hugging Face image layout, a CSV or JSONL with "
    "path and label (or labels), a tar of a class-folder tree, shards by pattern or URL, or the name digits; "
    "docs/data.md says how each is understood"
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
    ignored_because: tuple[tuple[str, int], ...] = ()
    """Why they are, and how many for each reason."""
    notes: tuple[str, ...] = ()
    """What was guessed when the data was read, a line each; warnings begin with `warning: `."""
    groups: np.ndarray | None = None
    """int64 (N,): which images show one thing and must stay on one side of a split; None where nothing says so."""
    excluded: str = ""
    """What was left out because a list says so, in words."""
    value_range: ValueRange | None = None
    """What becomes black and white of images of more than 8 bits; see `find_value_range`."""

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
            groups=None if self.groups is None else self.groups[chosen],
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
            return decode_image(content, max_pixels=max_pixels, value_range=self.value_range)
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
        names += f": {', '.join(f'{count:,} {why}' for why, count in self.ignored_because)}" * bool(
            self.ignored_because
        )
        return f"{counted(self.ignored, 'other file')} ignored" + f" ({names})" * bool(self.first_ignored)


def classes_in(labels: np.ndarray) -> set[int]:
    """The classes that some image has, of labels int64 (N,) or bool (N, K)."""
    return set((np.flatnonzero(labels.any(0)) if labels.ndim == 2 else np.unique(labels)).tolist())


def held_out_name(dataset: Dataset) -> str | None:
    """The split that training is judged on: `val` if the data has one, else `test`, else None."""
    return next((name for name in ("val", "test") if name in dataset.splits), None)


def printable(name: str) -> str:
    """A file's name as text that can be written as UTF-8, for a name may be any bytes."""
    return name.encode(errors="backslashreplace").decode()


def quoted(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(repr(abridged(name, 200)) for name in names)
