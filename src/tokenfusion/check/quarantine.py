"""Which images had better be left out, and why: what `train --exclude` takes."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from tokenfusion.check.look import Look
from tokenfusion.data.dataset import Dataset
from tokenfusion.files import write_csv

KEPT_FIRST = ("test", "val", "train", "")
"""Of copies in several splits the held-out one is kept, so that results stay comparable."""


def quarantine(
    source: Dataset, looks: list[Look], exact: list[list[int]], near: list[tuple[int, int]]
) -> dict[int, str]:
    """Images to leave out, each with its reason, in the order of the data.

    Unreadable ones; of exact duplicates all but one; of near duplicates all but one where they lie in different splits,
    or would, because the data has none; and every copy where copies have different labels. Near duplicates within one
    split and of one label stay, as do tiny, huge, animated, oddly coloured and disputed ones: look at those yourself.
    """
    reasons = {index: f"unreadable: {look.reason}" for index, look in enumerate(looks) if look.reason}
    serious = [pair for pair in near if "" in source.splits or differ(source, *pair)]
    same = {index: copies for copies in exact for index in copies}
    pairs = [pair for copies in exact for pair in pairwise(copies)] + serious
    for group in connected(len(looks), pairs):
        labels = {source.label_text(index) for index in group}
        first = min(group, key=lambda index: (KEPT_FIRST.index(source.splits[index]), index))
        for index in group:
            how = "exact" if first in same.get(index, ()) else "near"
            if len(labels) > 1:
                other = next(i for i in group if source.label_text(i) != source.label_text(index))
                reasons[index] = f"duplicate of {source.names[other]}, which has the label {source.label_text(other)}"
            elif index != first:
                reasons[index] = f"{how} duplicate of {source.names[first]}"
    return dict(sorted(reasons.items()))


def differ(source: Dataset, first: int, second: int) -> bool:
    """Whether two images lie in different splits or have different labels."""
    splits = source.splits[first] != source.splits[second]
    return splits or source.label_text(first) != source.label_text(second)


def connected(count: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Groups of two and more among `count` images that pairs connect, each in ascending order."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not pairs:
        return []
    first, second = np.array(pairs).T
    _, group = connected_components(coo_array((np.ones(len(pairs)), (first, second)), shape=(count, count)), False)
    groups: dict[int, list[int]] = {}
    for index in np.unique(np.concatenate([first, second])).tolist():
        groups.setdefault(int(group[index]), []).append(index)
    return list(groups.values())


def write_quarantine(path: Path, source: Dataset, reasons: dict[int, str]) -> None:
    """Write a CSV `path,reason`."""
    write_csv(path, ("path", "reason"), ((source.names[index], reason) for index, reason in reasons.items()))
