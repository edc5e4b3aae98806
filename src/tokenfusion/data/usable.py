"""What data must be to be worked on, and a warning of what is odd about its classes."""

from collections import Counter
from dataclasses import replace

import numpy as np

from tokenfusion.data.dataset import KINDS, Dataset, classes_in, held_out_name, quoted
from tokenfusion.data.labels import looks_of, warn_of_lookalikes, warn_of_missing
from tokenfusion.errors import InputError

LONGEST_CLASS = 1000
"""Most characters of a class's name: a longer one is a text, or a file that was put into the wrong column."""


def require_usable(dataset: Dataset) -> Dataset:
    """The dataset, if it can be worked on.

    Raises:
        InputError: there is no image, two classes have one name, a name is no name, some images name a split and
            others do not, or held-out images have a label that the training images lack.
    """
    where = dataset.where
    if not dataset.names:
        ignored = f", {dataset.ignored_in_words()}" * bool(dataset.ignored)
        raise InputError(f"{where}: no image found{ignored}; give {KINDS}")
    twice = [name for name, count in Counter(dataset.classes).items() if count > 1]
    if twice:
        raise InputError(f"{where}: several classes are called {quoted(twice)}; give each its own name")
    if long := next((name for name in dataset.classes if len(name) > LONGEST_CLASS), ""):
        raise InputError(
            f"{where}: {quoted([long])} is no name of a class; give one of up to {LONGEST_CLASS} characters"
        )
    if "" in dataset.splits and any(dataset.splits):
        name = dataset.names[dataset.splits.index("")]
        raise InputError(f"{where}: {name!r} is in no split while others are; name one for all images or none")
    splits = np.array(dataset.splits)
    known = classes_in(dataset.labels[splits == "train"])
    for split in ("val", "test"):
        unknown = classes_in(dataset.labels[splits == split]) - known
        if known and unknown:
            alike = {look: dataset.classes[c] for c in known for look in looks_of(dataset.classes[c])}
            names = [dataset.classes[c] for c in sorted(unknown)]
            pairs = [(name, next((alike[look] for look in looks_of(name) if look in alike), "")) for name in names]
            meant = [f"train has {other!r} for {name!r}" for name, other in pairs if other]
            raise InputError(
                f"{where}: {split} has labels that train lacks: {quoted(name for name, _ in pairs)}; "
                + (f"{', '.join(meant)}: give them one name, or " if meant else "")
                + f"add training images of them or take them out of {split}"
            )
    return dataset


def without_rare(dataset: Dataset) -> Dataset:
    """The dataset without the classes of which no image can be held out, for they have a single one; all are named."""
    if dataset.multi_label or held_out_name(dataset):
        return dataset
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes))
    rare, there = np.flatnonzero(counts < 2), np.flatnonzero(counts >= 2)
    if not len(rare):
        return dataset
    left = dataset.subset(np.flatnonzero(counts[dataset.labels] >= 2))
    note = f"dropped, for a single image cannot be held out too: {quoted(dataset.classes[label] for label in rare)}"
    classes = tuple(dataset.classes[label] for label in there)
    return replace(left, labels=np.searchsorted(there, left.labels), classes=classes, notes=(*left.notes, note))


def without_empty(dataset: Dataset) -> Dataset:
    """The dataset without the classes that no image has, each named in a warning; look-alikes are warned of too."""
    there = sorted(classes_in(dataset.labels))
    notes = [*dataset.notes]
    empty = [name for index, name in enumerate(dataset.classes) if index not in set(there)]
    if there and empty:
        notes.append(
            f"warning: left out, because no image has it: {'class' if len(empty) == 1 else 'classes'} "
            f"{quoted(empty[:5])}{f' and {len(empty) - 5:,} more' * (len(empty) > 5)}"
        )
        labels = dataset.labels[:, there] if dataset.multi_label else np.searchsorted(there, dataset.labels)
        dataset = replace(dataset, labels=labels, classes=tuple(dataset.classes[index] for index in there))
    notes += [
        line for line in [*warn_of_lookalikes(dataset.classes), *warn_of_missing(dataset.classes)] if line not in notes
    ]
    return replace(dataset, notes=tuple(notes))
