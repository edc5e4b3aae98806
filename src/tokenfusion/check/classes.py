"""Classes that are empty, rare or differ between splits."""

from typing import Any

import numpy as np

from tokenfusion.check.labels import MIN_IMAGES
from tokenfusion.formatting import counted

RARE = 0.1
"""Share of the median class, below which a class is rare."""


def count_classes(classes: tuple[str, ...], labels: np.ndarray, splits: list[str]) -> list[dict[str, Any]]:
    """How many images every class has in every split, and what is unusual about that.

    Args:
        classes: K names.
        labels: int64 (N,), or bool (N, K).
        splits: N names.

    Returns:
        for each class its `name`, `images` by split, and `notes`.
    """
    member = labels if labels.ndim == 2 else labels[:, None] == np.arange(len(classes))
    names = sorted(set(splits), key=("train", "val", "test", "").index)
    inside = np.array(splits)
    counts = np.array([member[inside == name].sum(0) for name in names])  # splits × classes
    middle = float(np.median(counts.sum(0)))
    rows = []
    for label, name in enumerate(classes):
        notes = []
        total = int(counts[:, label].sum())
        if total == 0:
            notes.append("has no image")
        elif total < max(RARE * middle, MIN_IMAGES):
            notes.append(f"is rare: {counted(total, 'image')}, where the median class has {middle:g}")
        for part, split in enumerate(names):
            if total and not counts[part, label]:
                notes.append(f"has no image in {split}")
            elif total and split != names[0]:
                notes += note_on_shares(counts[0], counts[part], label, names[0], split)
        rows.append({"name": name, "images": dict(zip(names, counts[:, label].tolist(), strict=True)), "notes": notes})
    return rows


def note_on_shares(one: np.ndarray, other: np.ndarray, label: int, name: str, other_name: str) -> list[str]:
    """What to say where a class's share of two splits differs by half or more, and by more than chance."""
    from scipy.stats import fisher_exact

    a, b = one[label] / one.sum(), other[label] / other.sum()
    if not a or max(a / b, b / a) < 1.5:
        return []
    table = [[one[label], one.sum() - one[label]], [other[label], other.sum() - other[label]]]
    if fisher_exact(table).pvalue >= 0.01 / len(one):  # Bonferroni: as many tests as classes
        return []
    return [f"is {a:.1%} of {name} and {b:.1%} of {other_name}"]
