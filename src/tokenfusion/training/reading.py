"""The images of a run: read once, split, the unreadable ones set aside."""

import shlex
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tokenfusion.data.dataset import Dataset, held_out_name
from tokenfusion.data.decoded import Images, Skipped, read_images, require_every_class, unread_images, write_skipped
from tokenfusion.data.split import Split, choose_split, read_split, write_split
from tokenfusion.errors import InputError
from tokenfusion.formatting import counted
from tokenfusion.recipe import Recipe
from tokenfusion.training.distributed import World
from tokenfusion.training.unreadable import read_file


def split_of(source: Dataset, recipe: Recipe, run: Path, world: World) -> Split:
    """The run's split: the one it wrote before, the data's own, or a new one that is written to the run folder."""
    path = run / "split.csv"
    if path.exists():
        return read_split(path, source)
    split = choose_split(source, recipe.val_fraction, recipe.seed)
    if held_out_name(source) is None and world.is_first:
        write_split(path, source, split)
    return split


def read_both(
    source: Dataset, split: Split, recipe: Recipe, run: Path, world: World, console: Console
) -> tuple[Images, Images]:
    """Decode every image once; set the unreadable ones aside in `skipped.csv`. Training images in shards are left for
    later: they may be more than can be looked at before training.

    Raises:
        InputError: too many are unreadable, or all of a class.
    """
    console.print(f"reading {counted(len(split.train) + len(split.val), 'image')}", highlight=False)
    images: list[Images] = []
    skipped: list[Skipped] = []
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        for name, indices in (("train", split.train), ("val", split.val)):
            if name == "train" and source.shards is not None:
                source.reader.require_room()
                images.append(unread_images(source, indices, recipe.max_pixels))
                continue
            task = bar.add_task(f"reading {name} images", total=len(indices))
            some, bad = read_images(
                source,
                indices,
                max_pixels=recipe.max_pixels,
                cache_bytes=recipe.cache_mb * 2**20,
                progress=report_to(bar, task),
                split=name,
            )
            images.append(some)
            skipped += bad
    training, held_out = images
    if not training.checked:
        skipped += [image for image in read_file(run / "skipped.csv") if image.split == "train"]  # met before resuming
    if skipped and world.is_first:
        write_skipped(run / "skipped.csv", skipped)
        console.print(
            f"set aside {counted(len(skipped), 'unreadable image')}, listed in {run / 'skipped.csv'}", highlight=False
        )
    require_every_class(training, source.classes)
    refuse_damage(split, training, held_out, skipped, recipe)
    where = "kept in memory" if training.cached else f"over cache_mb={recipe.cache_mb}, so decoded anew each epoch"
    where = where if training.checked else "in shards, decoded as they are drawn"
    ignored = f"{source.ignored_in_words()}; " * bool(source.ignored)
    parts = f"{len(training):,} training and {counted(len(held_out), 'held-out image')}"
    console.print(
        f"{ignored}{parts} of {counted(len(source.classes), 'class')}, {where}",
        highlight=False,
        soft_wrap=True,
    )
    return training, held_out


def report_to(bar: Progress, task: int) -> Callable[[int, int], None]:
    """A callback that moves a task of a bar to (done, total)."""
    return lambda done, total: bar.update(task, completed=done, total=total)  # type: ignore[arg-type]


def refuse_damage(split: Split, training: Images, held_out: Images, skipped: list[Skipped], recipe: Recipe) -> None:
    """Refuse data of which too much cannot be read."""
    if not skipped:
        return
    first = f"the first is {skipped[0].path}: {skipped[0].reason}"
    unreadable = len(split.train) - len(training)
    if unreadable > recipe.max_skipped * len(split.train):
        raise InputError(
            f"{unreadable} of {len(split.train):,} training images are unreadable, "
            f"more than max_skipped={recipe.max_skipped:g} allows ({first}); mend them, or leave out with --exclude "
            f"what `tokenfusion check {shlex.quote(recipe.data)}` finds, or raise --max-skipped"
        )
    if not len(held_out):
        raise InputError(f"none of the {len(split.val)} held-out images is readable ({first}); mend or replace them")
