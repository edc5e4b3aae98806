"""Images that turn out to be unreadable while training, where there are too many to look at each beforehand."""

import csv
from pathlib import Path

from rich.console import Console

from tokenfusion.data.decoded import Images, Skipped, write_skipped
from tokenfusion.errors import InputError


class Unreadable:
    """Notes unreadable training images in `skipped.csv`, each once, and refuses too many.

    A process but the first one writes `skipped-RANK.csv`, and all of them are counted. What is met again after a run
    was resumed is noted already, and refused again.

    Args:
        run: the run folder.
        training: the images.
        limit: largest share of them that is put up with.
        rank: of this process.
        console: where the first one is told.

    Raises:
        InputError: when called, of more images than the limit allows.
    """

    def __init__(self, run: Path, training: Images, limit: float, rank: int, console: Console) -> None:
        self.run, self.training, self.limit, self.console = run, training, limit, console
        self.path = run / (f"skipped-{rank}.csv" if rank else "skipped.csv")

    def __call__(self, unreadable: dict[int, str]) -> None:
        known = {image.path: image for image in read_skipped(self.run)}
        new = []
        for index, reason in unreadable.items():
            if (name := self.training.names[index]) not in known:
                label = self.training.dataset.label_text(index)
                new.append(Skipped(name, label, "train", reason))
        found = [image for image in [*known.values(), *new] if image.split == "train"]
        if new:
            write_skipped(self.path, [*read_file(self.path), *new])
        if new and len(found) == len(new):
            self.console.print(
                f"{new[0].path} cannot be read: {new[0].reason}; the next image of its batch is drawn in its place. "
                f"All such images are listed in {self.path}",
                highlight=False,
                soft_wrap=True,
            )
        if len(found) > self.limit * len(self.training):
            raise InputError(
                f"{len(found)} of {len(self.training)} training images are unreadable so far, more than "
                f"max_skipped={self.limit:g} allows (the last is {found[-1].path}: {found[-1].reason}); "
                "mend the shards, or start a new run with a larger --max-skipped, or without them by --exclude"
            )


def read_skipped(run: Path) -> list[Skipped]:
    """All images that a run's processes have noted."""
    return [image for path in sorted(run.glob("skipped*.csv")) for image in read_file(path)]


def read_file(path: Path) -> list[Skipped]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [Skipped(**row) for row in csv.DictReader(file)]
