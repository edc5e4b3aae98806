"""What people call the parts of their data: `Training`, `test set`, `val2017`, `is_valid`."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

SYNONYMS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "development", "holdout", "heldout"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
"""The three splits, and the words for each."""
SPLITS = {word: split for split, words in SYNONYMS.items() for word in words}
FILLERS = frozenset({"set", "data", "dataset", "split", "images", "imgs", "pictures", "photos"})
"""Words that say nothing beside a split's, as in `test set`."""
FLAGS = {
    "isvalid": ("val", "train"),
    "isval": ("val", "train"),
    "isvalidation": ("val", "train"),
    "istest": ("test", "train"),
    "istrain": ("train", "val"),
    "istraining": ("train", "val"),
}
"""Columns of yes and no, by `plain` name, and the split that each of the two means; `is_valid` is fastai's."""
TRUE, FALSE = frozenset({"true", "1", "1.0", "yes", "t", "y"}), frozenset({"false", "0", "0.0", "no", "f", "n", ""})


def split_named(name: object) -> str:
    """The split that a folder or a cell names, in any case and spacing; "" where it names none."""
    text = re.sub(r"(19|20)\d\d$", "", str(name).strip().casefold())  # val2017
    if text.replace(" ", "").replace("-", "").replace("_", "") in SPLITS:  # hold-out
        return SPLITS[text.replace(" ", "").replace("-", "").replace("_", "")]
    words = [word for word in re.split(r"[\W_]+", re.sub(r"set$", " set", text)) if word and word not in FILLERS]
    return SPLITS.get(words[0], "") if len(words) == 1 else ""


def split_in_name(name: str) -> str:
    """The split that is told by a file's name, or else in its folder's: `set-test-00000.parquet`, `val/0.parquet`."""
    for part in reversed(Path(name).parts):
        for word in re.split(r"[-._\s]", part.casefold()):
            if word in SPLITS:
                return SPLITS[word]
    return ""


def splits_in_words(pairs: Iterable[tuple[str, str]]) -> str:
    """What was understood of the names of splits, given each image's name and its meaning."""
    counts = Counter(pair for pair in pairs if pair[1])
    ordered = sorted(counts.items(), key=lambda item: (*SYNONYMS,).index(item[0][1]))
    return "splits: " + ", ".join(f"{name} -> {split} ({count:,})" for (name, split), count in ordered)


def split_flagged(column: str, value: object) -> str | None:
    """The split that a column of yes and no gives, such as fastai's `is_valid`; None where it is neither.

    Args:
        column: its `plain` name, one of FLAGS.
        value: of a row.
    """
    text = str(value).strip().casefold()
    if text in TRUE or text in FALSE:
        return FLAGS[column][text in FALSE]
    return None
