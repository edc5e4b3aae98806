"""What people call the parts of their data: `Training`, `test set`, `val2017`, `is_valid`."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

SYNONYMS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "development", "holdout", "heldout"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
"""The three splits, and the words for each."""
SPLITS = {word: split for split, words in SYNONYMS.items() for word in words}
FILLERS = frozenset(
    {"set", "data", "dataset", "split", "images", "image", "img", "imgs", "pictures", "photos", "folder", "files"}
    | {"public", "private"}
)
"""Words that say nothing beside a split's, as in `test set` and `PublicTest`; so do numbers and single letters."""
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


def words_of(name: object) -> list[str]:
    """The words of a name in small letters, cut at signs, capitals and numbers; a split's word stands alone.

    `Hold-Out` is `holdout`, `trainset` is `train set`, `TestFolder` `test folder`, and `val2017` `val 2017`.
    """
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", str(name)))
    text = re.sub(r"(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])", " ", text.casefold())
    text = re.sub(r"\b(hold|held)[\W_]+out\b", r"\1out", text.replace("_", " "))
    words: list[str] = []
    for word in re.split(r"[\W_]+", text):
        joined = [filler for filler in FILLERS if word.endswith(filler) and word.removesuffix(filler) in SPLITS]
        words += [word.removesuffix(joined[0]), joined[0]] if joined else [word] * bool(word)
    return words


def split_named(name: object) -> str:
    """The split that a folder or a cell names, in any case and spacing; "" where it names none."""
    words = [w for w in words_of(name) if w not in FILLERS and not w.isdecimal() and len(w) > 1]
    return SPLITS.get(words[0], "") if len(words) == 1 else ""


def splits_named(names: Iterable[str]) -> dict[str, str]:
    """Those of folders side by side that name splits, and which.

    Each may name one by itself, as `split_named` tells; else some name several and differ in that word alone, such as
    `seg_train` and `seg_test`, and all others beside them have the other words too, such as `seg_pred`.
    """
    names = list(names)
    plain = {name: split for name in names if (split := split_named(name))}
    if plain:
        return plain
    likes: dict[str, dict[str, str]] = {}
    for name in names:
        words = words_of(name)
        told = [word for word in words if word in SPLITS]
        if len(told) == 1:
            rest = " ".join("*" if word in SPLITS else word for word in words if not word.isdecimal())
            likes.setdefault(rest, {})[name] = SPLITS[told[0]]
    for rest, found in likes.items():
        needed = set(rest.split()) - {"*"}
        if len(set(found.values())) > 1 and all(needed <= set(words_of(name)) for name in names):
            return found
    return {}


def begins_as_split(name: str) -> bool:
    """Whether a name begins with a split's word and says more, as `training shoes` does: things are called so, too."""
    return not split_named(name) and words_of(name)[0] in SPLITS


def split_in_name(name: str) -> str:
    """The split that is told by a file's name, or else in its folder's: `set-test-00000.parquet`, `val/0.parquet`."""
    for part in reversed(Path(name).parts):
        for word in words_of(part):
            if word in SPLITS:
                return SPLITS[word]
    return ""


def splits_in_paths(paths: Sequence[str]) -> list[tuple[str, str]]:
    """The folder that tells each path's split, and the split, by the first level at which folders name splits.

    Empty unless each path's folder there names one, and they name two or more.
    """
    parts = [path.split("/")[:-1] for path in paths]
    for level in range(min(map(len, parts), default=0)):
        told = [part[level] for part in parts]
        names = splits_named(sorted(set(told)))
        if set(told) == names.keys() and len(set(names.values())) > 1:
            return [(folder, names[folder]) for folder in told]
    return []


def splits_in_words(pairs: Iterable[tuple[str, str]]) -> str:
    """What was understood of the names of splits, given each image's name and its meaning."""
    counts = Counter(pair for pair in pairs if pair[1])
    ordered = sorted(counts.items(), key=lambda item: (*SYNONYMS,).index(item[0][1]))
    return "splits: " + ", ".join(f"{name} -> {split} ({count:,})" for (name, split), count in ordered)


def split_flagged(column: str, value: object) -> str | None:
    """The split that a column of yes and no gives, such as fastai's `is_valid`; None where it is neither. Empty is no.

    Args:
        column: its `plain` name, one of FLAGS.
        value: of a row.
    """
    text = "" if value is None else str(value).strip().casefold()
    if text in TRUE or text in FALSE:
        return FLAGS[column][text in FALSE]
    return None
