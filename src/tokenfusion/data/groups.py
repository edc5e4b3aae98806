"""Images that show one thing, such as one patient or one scene: they must stay on one side of a split."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np

from tokenfusion.data.dataset import Dataset, quoted
from tokenfusion.errors import InputError
from tokenfusion.formatting import counted


def group_by(dataset: Dataset, pattern: str) -> Dataset:
    """A dataset with a group for each image, by what a regular expression finds in its name.

    Args:
        dataset: the images; where they have groups already, these are replaced.
        pattern: its first group in brackets is the image's group, or all that it matches where it has none; "" leaves
            the dataset as it is.

    Raises:
        InputError: it is no regular expression, or matches no image's name, or its groups straddle the data's splits.
    """
    if pattern:
        try:
            find = re.compile(pattern)
        except re.error as error:
            raise InputError(f"group_by={pattern!r} is no regular expression: {error}; try '^(.*)_'") from error
        found = [find.search(name) for name in dataset.names]
        if not any(found):
            raise InputError(
                f"group_by={pattern!r} matches no image's name, such as {quoted(dataset.names[:2])}; mend it"
            )
        keys = [
            f"={match[1] if find.groups else match[0]}" if match else f"alone {index}"
            for index, match in enumerate(found)
        ]
        groups = np.unique(keys, return_inverse=True)[1].astype(np.int64)
        dataset = replace(dataset, groups=groups)
        unmatched = f"; {counted(found.count(None), 'image')} matched nothing and stand alone" * (None in found)
        note = f"groups by {pattern!r}: {len(set(keys)):,}{unmatched}"
        dataset = replace(dataset, notes=(*dataset.notes, note))
    elif dataset.groups is not None:
        dataset = replace(dataset, notes=(*dataset.notes, f"groups: {len(np.unique(dataset.groups)):,}"))
    refuse_straddling(dataset)
    return dataset


def refuse_straddling(dataset: Dataset) -> None:
    """Refuse data whose own splits cut a group, InputError."""
    if dataset.groups is None or not any(dataset.splits):
        return
    splits: dict[int, set[str]] = {}
    for group, split in zip(dataset.groups.tolist(), dataset.splits, strict=True):
        splits.setdefault(group, set()).add(split)
    cut = [group for group, parts in splits.items() if len(parts) > 1]
    if cut:
        names = [name for name, group in zip(dataset.names, dataset.groups.tolist(), strict=True) if group == cut[0]]
        raise InputError(
            f"{dataset.where}: {counted(len(cut), 'group')} of images on both sides of the data's own split, such as "
            f"that of {quoted(names[:3])}; move each to one side, or leave the groups out"
        )


LARGE = 0.25
"""Share of a class in a split, above which images whose names begin alike are not taken for pictures of one thing."""


def suspected_groups(dataset: Dataset) -> str:
    """What to say where names look as if several images showed one thing: `patient7_1.png`, `patient7_2.png`.

    Names count that differ by a number at their end alone, where what stands before it has a number too or differs
    within a class; "" where there is nothing to say. What more than `LARGE` of a class begin with, such as `IMG` or the
    class itself, is how a camera or a data set calls its images, and no group to split by.
    """
    if dataset.groups is not None or len(dataset) < 4:
        return ""
    stems = [re.match(r"^(.+?)[-_. (]+\d+\)?$", re.sub(r"\.\w+$", "", name)) for name in dataset.names]
    parts = list(zip(map(dataset.label_text, range(len(dataset))), dataset.splits, strict=True))
    sizes = Counter(parts)
    found = [(stem[1], part) for stem, part in zip(stems, parts, strict=True) if stem and stem[1][-1] != "/"]
    large = {key for (key, part), count in Counter(found).items() if count > LARGE * sizes[part]}
    keys = [key for key, _ in found if key not in large]
    groups = Counter(keys)
    classes = max(len(dataset.classes), 1) * max(len(set(dataset.splits)), 1)
    if 2 * len(keys) < len(dataset) or len(groups) <= classes or 2 * len(groups) > len(keys):
        return ""
    key, count = groups.most_common(1)[0]
    return (
        f"names differ by a counter alone, such as {count} that begin with {key!r}: if these show one thing, keep them "
        f"on one side of the split with --group-by '^(.+?)[-_. (]+\\d+\\)?[.]\\w+$' ({len(groups):,} groups)"
    )
