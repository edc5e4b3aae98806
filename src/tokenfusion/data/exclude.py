"""Images that are left out because a list says so."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from tokenfusion.data.sources import Source, open_source, quoted
from tokenfusion.errors import InputError


@dataclass(eq=False, kw_only=True)
class Remaining(Source):
    """A source without some of its images."""

    whole: Source
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
        excluded = f"{len(self.whole) - len(self):,} images excluded"
        return f"{excluded}; {self.unknown:,} paths of the list are not in the data" if self.unknown else excluded


def open_remaining(data: str | Path, exclude: str) -> Source:
    """Open labelled images without those that a list names.

    Args:
        data: as `open_source` takes it.
        exclude: a CSV with a column `path`, as `tokenfusion check` writes it, names as it prints them; "" for none.
            Those that the data does not have are counted.

    Raises:
        InputError: the data or the list cannot be read, the data has none of the list's paths, or the list leaves
            nothing of a split.
    """
    source = open_source(data)
    if not exclude:
        return source
    paths = read_paths(Path(exclude))
    kept = np.array([index for index, name in enumerate(source.names) if name not in paths], dtype=np.int64)
    unknown = len(paths - set(source.names))
    if paths and unknown == len(paths):
        raise InputError(
            f"{exclude}: none of its {len(paths)} paths is in {source.where}; it has {quoted(sorted(paths)[:1])}, and "
            f"the data {quoted(source.names[:1])}: give the list that was made for this data"
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
        weights=None if source.weights is None else source.weights[kept],
        whole=source,
        kept=kept,
        unknown=unknown,
    )


def read_paths(path: Path) -> set[str]:
    """The column `path` of a CSV."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if "path" not in columns:
                raise InputError(f"{path}: its first line is {list(columns)}; it must name a column path")
            return {row["path"] for row in reader if row["path"]}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); give the quarantine.csv that check wrote, "
            "or put it back where the run expects it"
        ) from error
