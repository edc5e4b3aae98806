"""Which images are trained on and which are held out."""

import csv
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenfusion.data.dataset import Dataset, classes_in, held_out_name, quoted
from tokenfusion.data.kinds import LIST_ENDINGS
from tokenfusion.errors import InputError
from tokenfusion.files import write_csv


@dataclass(frozen=True, eq=False)
class Split:
    """Indices into a dataset, int64, ascending."""

    train: np.ndarray
    val: np.ndarray


def choose_split(dataset: Dataset, val_fraction: float, seed: int, rare_classes: str = "refuse") -> Split:
    """The data's own split into training and held-out images, or else one drawn class by class.

    Where images stand in groups, whole groups are held out (see `hold_out_groups`).
    Multi-label data is drawn so that each class is held out in about the same share (see `stratified`).

    Args:
        dataset: the images; where it has no held-out part, one is drawn from its training images.
        val_fraction: share of each class that is held out, rounded to whole images, at least one.
        seed: decides which.
        rare_classes: "train" on classes with a single image rather than refuse the data; where they are to be dropped,
            `open_dataset` has done it.

    Raises:
        InputError: there is only one class, or a class has no training image, or too few to hold one out.
    """
    if len(dataset.classes) < 2 and not dataset.multi_label:
        lists = [file for file in dataset.first_ignored if file.lower().endswith(LIST_ENDINGS)]
        unpack = "" if Path(dataset.where).is_dir() else "unpack it and "
        hint = f"; if {lists[0]!r} in it labels the images, {unpack}give that" if lists else ""
        raise InputError(
            f"{dataset.where}: a single class, {dataset.classes[0]!r}; a classifier needs at least two{hint}"
        )
    splits = np.array(dataset.splits)
    held_out = held_out_name(dataset)
    candidates = np.flatnonzero((splits == "train") | (splits == ""))
    if held_out is not None:
        require_images(dataset, candidates, 1)
        return Split(candidates, np.flatnonzero(splits == held_out))
    if dataset.groups is not None:
        return hold_out_groups(dataset, candidates, dataset.groups[candidates], val_fraction, seed)
    if dataset.shards is not None:
        return hold_out_shards(dataset, dataset.shards, val_fraction, seed)
    if dataset.multi_label:
        require_images(dataset, candidates, 1)
        chosen = candidates[stratified(dataset.labels[candidates], val_fraction, seed)]
        if not len(chosen):
            raise InputError(
                f"{dataset.where}: no class has two images, one to train on and one to hold out; add images"
            )
        return Split(np.setdiff1d(candidates, chosen), chosen)
    require_images(dataset, candidates, 1 if rare_classes == "train" else 2)
    val = []
    for label in range(len(dataset.classes)):
        members = candidates[dataset.labels[candidates] == label]
        count = min(max(round(len(members) * val_fraction), 1), len(members) - 1)
        val.append(np.random.default_rng([seed, label]).permutation(members)[:count])
    chosen = np.sort(np.concatenate(val))
    return Split(np.setdiff1d(candidates, chosen), chosen)


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw the images to hold out by iterative stratification, the rarest class first.

    A class with two images or more is held out at least once unless its images are all needed on one side by rarer
    classes; every class that has an image keeps one to train on. The number held out may differ by a few from
    fraction × N.

    Args:
        labels: bool (N, K): whether an image has each class; N is 2 or more.
        fraction: share of each class that is held out, in (0, 1).
        seed: decides which.

    Returns:
        int64 (n,): indices of the held-out images, ascending.

    Source: Sechidis et al., On the Stratification of Multi-Label Data, 2011, algorithm 1, with two parts.
    """
    random = np.random.default_rng(seed)
    # images without any class are a class of their own here
    labels = np.column_stack([labels, ~labels.any(1)])
    counts = labels.sum(0)
    wanted = np.clip(counts * fraction, np.minimum(1, counts // 2), np.maximum(counts - 1, 0))
    wanted = np.stack([counts - wanted, wanted])  # (2, K + 1) of training and held-out images still to place
    room = len(labels) * np.array([1 - fraction, fraction])
    side = np.full(len(labels), -1)
    left = counts.copy()
    while left.any():
        rarest = np.where(left > 0, left, len(labels) + 1).argmin()
        for image in random.permutation(np.flatnonzero(labels[:, rarest] & (side < 0))):
            needs = [(wanted[part, rarest], room[part]) for part in (0, 1)]
            side[image] = part = int(needs[1] > needs[0])
            wanted[part, labels[image]] -= 1
            room[part] -= 1
            left -= labels[image]
    for label in np.flatnonzero(counts):
        if not (side[labels[:, label]] == 0).any():
            side[np.flatnonzero(labels[:, label])[0]] = 0
    return np.flatnonzero(side == 1)


def hold_out_groups(
    dataset: Dataset, candidates: np.ndarray, groups: np.ndarray, val_fraction: float, seed: int
) -> Split:
    """Hold out whole groups, of each class about the same share (scikit-learn's StratifiedGroupKFold, a fold of it).

    Args:
        dataset: the images.
        candidates: int64 (n,), those that are trained on or held out.
        groups: int64 (n,), of each of them.
        val_fraction: share of the images that is held out, about.
        seed: decides which.

    Raises:
        InputError: there is one group alone, or all groups of a class are held out.
    """
    from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold

    several = len(np.unique(groups))
    if several < 2:
        raise InputError(f"{dataset.where}: all images are of one group, and none can be held out; mend the groups")
    labels = dataset.labels[candidates]
    if dataset.multi_label:
        folds = GroupShuffleSplit(8, test_size=val_fraction, random_state=seed)
    else:
        parts = min(max(round(1 / val_fraction), 2), several)
        folds = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer images than folds
        drawn = list(folds.split(labels, None if dataset.multi_label else labels, groups))
    missing = [len(classes_in(labels) - classes_in(labels[train])) for train, _ in drawn]
    train, val = drawn[int(np.argmin(missing))]  # the first that leaves every class something to train on
    if min(missing):
        lost = sorted(classes_in(labels) - classes_in(labels[train]))
        raise InputError(
            f"{dataset.where}: whichever groups are held out, a class has none left to train on, such as "
            f"{dataset.classes[lost[0]]!r}; add images of other groups to it"
        )
    return Split(candidates[np.sort(train)], candidates[np.sort(val)])


def hold_out_shards(dataset: Dataset, shards: np.ndarray, val_fraction: float, seed: int) -> Split:
    """Hold out whole shards, at least one, so that validation fetches those alone.

    Raises:
        InputError: there is a single shard, or a class lies in the shards that are held out only.
    """
    numbers = np.unique(shards)
    if len(numbers) < 2:
        raise InputError(
            f"{dataset.where}: a single shard, and none to hold out; pack more, or name them train-*.tar and val-*.tar"
        )
    count = min(max(round(len(numbers) * val_fraction), 1), len(numbers) - 1)
    held_out = np.isin(shards, np.random.default_rng(seed).permutation(numbers)[:count])
    require_images(dataset, np.flatnonzero(~held_out), 1)
    return Split(np.flatnonzero(~held_out), np.flatnonzero(held_out))


def require_images(dataset: Dataset, candidates: np.ndarray, least: int) -> None:
    """Refuse classes with fewer than `least` images to train on, and name them all."""
    counts = count_images(dataset, candidates)
    few = [(name, count) for name, count in zip(dataset.classes, counts, strict=True) if count < least]
    if few:
        (name, count), *others = few
        also = f" (so do {len(others)} more: {quoted(other for other, _ in others)})"
        reason = "to train on" if least == 1 else "one to train on and one to hold out"
        keep = ", or give --rare-classes train to hold none of it out, or drop to leave it out" * (least == 2)
        raise InputError(
            f"{dataset.where}: class {name!r} has {count} training images{also * bool(others)}; it needs at least "
            f"{least}, {reason}. Add images of it or remove the class{keep}"
        )


def count_images(dataset: Dataset, indices: np.ndarray) -> np.ndarray:
    """int64 (K,): how many of some images have each class."""
    labels = dataset.labels[indices]
    return labels.sum(0) if dataset.multi_label else np.bincount(labels, minlength=len(dataset.classes))


def never_held_out(dataset: Dataset, split: Split) -> str:
    """A line that names the classes of which no image is held out; "" where there are none."""
    counts = count_images(dataset, split.val)
    names = [name for name, count in zip(dataset.classes, counts, strict=True) if not count]
    return f"trained on and never held out, so that nothing is known of how well: {quoted(names)}" if names else ""


def header_of(dataset: Dataset) -> list[str]:
    """The columns of split.csv."""
    return ["path", "labels" if dataset.multi_label else "label", "split"]


def write_split(path: Path, dataset: Dataset, split: Split) -> None:
    """Write which split each image is in as a CSV `path,label,split`; images in neither have an empty one.

    Of multi-label data the column is `labels`, with `|` between them.
    """
    names = np.full(len(dataset), "", dtype=object)
    names[split.train], names[split.val] = "train", "val"
    labels = map(dataset.label_text, range(len(dataset)))
    write_csv(path, header_of(dataset), zip(dataset.names, labels, names, strict=True))


def read_split(path: Path, dataset: Dataset) -> Split:
    """Read what `write_split` wrote for the same images.

    Raises:
        InputError: the file is missing or damaged, or the data is no longer what it was; the first difference is named.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); start a new run") from error
    columns = header_of(dataset)
    if header != columns or any(len(row) != len(columns) for row in rows):
        raise InputError(f"{path}: not the split of a run, which has the columns {','.join(columns)}; start a new run")
    for index in range(max(len(rows), len(dataset))):
        then = rows[index][:2] if index < len(rows) else None
        now = [dataset.names[index], dataset.label_text(index)] if index < len(dataset) else None
        if then != now:
            raise InputError(
                f"{dataset.where}: image {index} was {then} when the split was written and is {now} now; "
                "restore the data, or start a new run"
            )
    names = np.array([row[2] for row in rows])
    return Split(np.flatnonzero(names == "train"), np.flatnonzero(names == "val"))
