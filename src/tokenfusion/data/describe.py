"""What data was taken to be, in words: printed before training, and shown by `check` to be confirmed."""

from collections import Counter

import numpy as np

from tokenfusion.data.dataset import Dataset
from tokenfusion.formatting import counted

MANY = 12
"""Classes that are named with their counts; of more, the rarest."""


def describe(dataset: Dataset) -> list[str]:
    """Classes with their counts, splits, what was guessed, what was ignored: a line each."""
    lines = [f"data: {counted(len(dataset), 'image')} of {classes_in_words(dataset)}"]
    notes = list(dataset.notes)
    if any(dataset.splits) and not any(note.startswith("splits: ") for note in notes):
        sizes = Counter(dataset.splits)
        lines.append(
            f"splits: {', '.join(f'{name} ({sizes[name]:,})' for name in ('train', 'val', 'test') if sizes[name])}"
        )
    lines += notes
    if dataset.ignored:
        lines.append(dataset.ignored_in_words())
    return lines


def classes_in_words(dataset: Dataset) -> str:
    """How many classes there are, and how many images each has: all of a few, the rarest of many."""
    one_hot = dataset.labels.ndim == 2
    counts = dataset.labels.sum(0) if one_hot else np.bincount(dataset.labels, minlength=len(dataset.classes))
    order = np.arange(len(counts)) if len(counts) <= MANY else np.argsort(counts, kind="stable")[:MANY]
    named = ", ".join(f"{dataset.classes[label]} {counts[label]:,}" for label in order)
    several = ", several labels an image" * one_hot
    return f"{counted(len(counts), 'class')}{several}, {'the rarest: ' * (len(counts) > MANY)}{named}"
