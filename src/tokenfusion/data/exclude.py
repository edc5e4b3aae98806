"""Images that are left out because a list says so."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from tokenfusion.data.dataset import Dataset, quoted
from tokenfusion.errors import InputError
from tokenfusion.files import write_bytes
from tokenfusion.formatting import counted

EXCLUDED = "excluded.csv"
"""A run's own copy of its list: the run needs the file that was given no more."""


@dataclass(eq=False, kw_only=True)
class Remaining(Dataset):
    """A source without some of its images."""

    whole: Dataset
    kept: np.ndarray
    """int64 (N,): which of the whole's images these are, ascending."""
    unknown: int
    """Paths of the list that the whole does not have."""

    def decode(self, index: int, max_pixels: int) -> Tensor:
        return self.whole.decode(int(self.kept[index]), max_pixels)

    @property
    def shard_numbers(self) -> np.ndarray | None:
        numbers = self.whole.shard_numbers
        return None if numbers is None else numbers[self.kept]

    @property
    def shard_sizes(self) -> list[int] | None:
        return self.whole.shard_sizes

    def fetch(self, number: int) -> None:
        self.whole.fetch(number)

    def require_room(self) -> None:
        self.whole.require_room()

    def __str__(self) -> str:
        excluded = f"{counted(len(self.whole) - len(self), 'image')} excluded"
        return f"{excluded}; not in the data: {counted(self.unknown, 'path')} of the list" if self.unknown else excluded


def keep_list(run: Path, exclude: str) -> None:
    """Copy a list into a run folder.

    Raises:
        InputError: it cannot be read, or is no such list.
    """
    content = read_list(Path(exclude))  # once: it may be a pipe
    paths_in(content, exclude)
    write_bytes(run / EXCLUDED, content)


def leave_out(source: Dataset, paths: set[str], exclude: str) -> Remaining:
    """A source without the images of some paths; `exclude` is what messages call these.

    Raises:
        InputError: the source has none of them, or nothing of a split is left.
    """
    kept = np.array([index for index, name in enumerate(source.names) if name not in paths], dtype=np.int64)
    unknown = len(paths - set(source.names))
    if paths and unknown == len(paths):
        raise InputError(
            f"{exclude}: nothing that it names ({counted(unknown, 'path')}) is in {source.where}; it has "
            f"{quoted(sorted(paths)[:1])}, and the data {quoted(source.names[:1])}: give the list of this data"
        )
    if not len(kept):
        raise InputError(f"{exclude}: it names every image of {source.where}; take some out of the list")
    splits = [source.splits[index] for index in kept]
    gone = [name for name in dict.fromkeys(source.splits) if name not in splits]
    if gone:
        raise InputError(f"{exclude}: it names every image of {gone[0]} in {source.where}; take some out of the list")
    return Remaining(
        where=source.where,
        classes=source.classes,
        names=[source.names[index] for index in kept],
        labels=source.labels[kept],
        splits=splits,
        ignored=source.ignored,
        first_ignored=source.first_ignored,
        weights=None if source.weights is None else source.weights[kept],
        whole=source,
        kept=kept,
        unknown=unknown,
    )


def read_list(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(str(path), error) from error


def paths_in(content: bytes, where: str) -> set[str]:
    """The column `path` of a CSV; `where` is what messages call it."""
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        columns = reader.fieldnames or []
        if "path" not in columns:
            raise InputError(f"{where}: its first line is {list(columns)}; it must name a column path")
        return {row["path"] for row in reader if row["path"]}
    except (UnicodeDecodeError, csv.Error) as error:
        raise unreadable(where, error) from error


def unreadable(where: str, error: Exception) -> InputError:
    return InputError(f"{where}: cannot be read ({error}); give the quarantine.csv that check wrote")
