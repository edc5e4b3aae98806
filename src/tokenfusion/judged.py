"""Which images a run is judged by: its own held-out ones, wherever they lie now, or other ones."""

import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenfusion.checkpoint import value_range_of
from tokenfusion.data.dataset import Dataset, held_out_name
from tokenfusion.data.decoded import Images, Skipped, read_images
from tokenfusion.data.groups import group_by
from tokenfusion.data.kinds import require_place, resolved
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import Split, read_split
from tokenfusion.errors import InputError
from tokenfusion.recipe import Recipe
from tokenfusion.trained_on import found_again, load_trained_on


def open_judged(
    run: Path, recipe: Recipe, data: str | None, root: str = "", encoding: str = ""
) -> tuple[Dataset, str, bool]:
    """The data to judge a run by, what it is called, and whether it is the run's own, as it is where none is given.

    Raises:
        InputError: it cannot be opened, or the run's own images are not where they were.
    """
    recipe = recipe if data else found_again(recipe, run)
    own = not data or resolved(data) == resolved(recipe.data)
    name = recipe.data if not data or own else resolved(data)
    reading = recipe.reading
    if root or not own:
        reading = replace(reading, root=root and os.path.abspath(root))
    reading = replace(reading, encoding=encoding or reading.encoding)
    if own:
        require_place(name, f"tokenfusion train --resume {shlex.quote(str(run))} --data NEW")
        source = open_dataset(name, recipe.exclude, run, reading)
    else:  # columns are called as they were, and images too where its names have groups
        source = open_dataset(name, reading=replace(reading, group_by="", rare_classes="refuse"))
        if reading.group_by:
            with suppress(InputError):
                source = group_by(source, reading.group_by)
    return replace(source, value_range=value_range_of(run)), name, own


@dataclass(frozen=True)
class Judged:
    """The images that a run is judged by."""

    images: Images
    skipped: list[Skipped]
    split: str
    own: bool
    """Whether they are the run's own, wherever they lie now."""
    trained_on: int | None
    """How many of the data's images the run was trained on; None where that is not known."""
    left_out: bool
    """Whether these are left out."""


def judged_images(
    run: Path,
    recipe: Recipe,
    source: Dataset,
    *,
    own: bool,
    split: str | None,
    keep: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Read the images to judge a run by: known by their pixels, those that it was trained on are left out.

    The run's own held-out images are judged whatever they look like, and so are they where they have moved.

    Args:
        run: its folder.
        recipe: of the run, for its limits.
        source: the data.
        own: whether that is the run's own.
        split: as in `evaluate`.
        keep: whether to judge images too that the run was trained on.
        progress: called with (images read, images in all).

    Raises:
        InputError: nothing can be read, or the run was trained on all of it.
    """
    known, parts = load_trained_on(run), None if own or keep else moved_split(run, source)
    if parts is not None:
        images, skipped, name = read_part(source, run, recipe, own=True, split=split, progress=progress)
        if name == "val" and known.are_held_out(images):
            return Judged(images, skipped, name, True, len(parts.train), True)
    images, skipped, name = read_part(source, run, recipe, own=own, split=split, progress=progress)
    own, met = own or known.are_held_out(images), known.met(images)
    seen = None if met is None else int(met.sum())
    if own or keep or met is None or not seen:
        return Judged(images, skipped, name, own, seen, False)
    if seen == len(images):
        raise InputError(
            f"the run was trained on all {seen:,} images of {source.where} that are to be judged; give others, or "
            "--with-training-images to judge it by them all the same"
        )
    images = images.subset(np.flatnonzero(~met))
    own = known.are_held_out(images)
    return Judged(images, skipped, "val" if own and name == "all" else name, own, seen, True)


def moved_split(run: Path, source: Dataset) -> Split | None:
    """The split that a run wrote, if names and labels of other data agree with it."""
    with suppress(InputError):
        return read_split(run / "split.csv", source)
    return None


class Part(NamedTuple):
    """Images of a part of the data, and its name."""

    images: Images
    skipped: list[Skipped]
    name: str


def read_own_part(run: Path, recipe: Recipe, *, split: str | None = None, most: int | None = None) -> Part:
    """A run's own held-out images, or those of another part; see `open_judged` and `read_part`."""
    source, _, own = open_judged(run, recipe, None)
    return read_part(source, run, recipe, own=own, split=split, most=most)


def read_part(
    source: Dataset,
    run: Path,
    recipe: Recipe,
    *,
    own: bool,
    split: str | None = None,
    most: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Part:
    """Read a part of the data, within a recipe's limits.

    Args:
        source, run, recipe, own, split, progress: as in `judged_images`.
        most: how many images to read, spread evenly over the part; all when not given.

    Raises:
        InputError: the data has no such part, or none of its images can be read.
    """
    name, indices = choose_images(source, run, own=own, split=split)
    if most is not None:
        indices = indices[np.linspace(0, len(indices) - 1, min(most, len(indices))).round().astype(np.int64)]
    limits = {"max_pixels": recipe.max_pixels, "cache_bytes": recipe.cache_mb * 2**20}
    images, skipped = read_images(source, indices, **limits, progress=progress, split=name)
    if not len(images):
        raise InputError(f"none of {len(indices)} images of {source.where} is readable; the first: {skipped[0].reason}")
    return Part(images, skipped, name)


def choose_images(source: Dataset, run: Path, *, own: bool, split: str | None) -> tuple[str, np.ndarray]:
    """Which part of the data is evaluated: its name and its indices."""
    path = run / "split.csv"
    if own and path.exists():
        parts = read_split(path, source)
        name = split or "val"
        if name not in ("train", "val"):
            raise InputError(f"split={name!r} is not part of this run; choose train or val")
        return name, parts.train if name == "train" else parts.val
    name = split or held_out_name(source) or ""
    meant = {name, ""} if name == "train" and name in source.splits else {name}  # as training takes them
    chosen = np.array([i for i, part in enumerate(source.splits) if not name or part in meant], dtype=np.int64)
    if not len(chosen):
        there = ", ".join(sorted({part for part in source.splits if part})) or "no parts"
        raise InputError(f"split={name!r} is empty; the data has {there}")
    return name or "all", chosen
