"""Which images had better be left out, and why: what `train --exclude` takes."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from tokenfusion.check.inspection import Inspection
from tokenfusion.data.dataset import Dataset
from tokenfusion.files import write_csv

KEPT_FIRST = ("test", "val", "train", "")
"""Of copies in several splits the held-out one is kept, so that results stay comparable."""


def quarantine(
    dataset: Dataset, inspections: list[Inspection], exact: list[list[int]], near: list[tuple[int, int]]
) -> dict[int, str]:
    """Images to leave out, each with its reason, in the order of the data.

    Unreadable ones; of exact duplicates all but one; of near duplicates all but one where they lie in different splits,
    or would, because the data has none; and every copy where copies have different labels. Near duplicates within one
    split and of one label stay, as do tiny, huge, animated, oddly coloured and disputed ones: look at those yourself.
    """
    label, splits = dataset.label_text, dataset.splits
    reasons = {index: f"unreadable: {image.reason}" for index, image in enumerate(inspections) if image.reason}
    serious = [(i, j) for i, j in near if "" in splits or splits[i] != splits[j] or label(i) != label(j)]
    same = {index: copies for copies in exact for index in copies}
    pairs = [pair for copies in exact for pair in pairwise(copies)] + serious
    for group in connected(len(dataset), pairs):
        first = min(group, key=lambda index: (KEPT_FIRST.index(splits[index]), index))
        for index in group:
            others = [i for i in group if label(i) != label(index)]
            how = "exact" if first in same.get(index, ()) else "near"
            if others:
                name = dataset.names[others[0]]
                reasons[index] = f"duplicate of {name}, which has the label {label(others[0])}"
            elif index != first:
                reasons[index] = f"{how} duplicate of {dataset.names[first]}"
    return dict(sorted(reasons.items()))


def connected(count: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Groups of two and more among `count` images that pairs connect, each in ascending order."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (first, second)), shape=(count, count))
    _, group = connected_components(graph, directed=False)
    groups: dict[int, list[int]] = {}
    for index in np.union1d(first, second).tolist():
        groups.setdefault(int(group[index]), []).append(index)
    return list(groups.values())


def write_quarantine(path: Path, dataset: Dataset, reasons: dict[int, str]) -> None:
    """Write a CSV `path,reason`."""
    write_csv(path, ("path", "reason"), ((dataset.names[index], reason) for index, reason in reasons.items()))
