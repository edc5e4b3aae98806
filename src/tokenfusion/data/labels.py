"""Labels as a person means them: one form of Unicode, no spaces at the ends, no two that look alike unnoticed."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from tokenfusion.data.dataset import printable, quoted
from tokenfusion.errors import InputError

LOOKALIKES = str.maketrans(
    "аеіјорсухѕԁԛԝһӏαοινκρτυχ0",
    "aeijopcyxsdqwhlaoivkptyxo",
)
"""Cyrillic and Greek letters, and zero, that look like Latin ones."""
CAPITALS = str.maketrans(
    "АВЕКМНОРСТУХЅІЈӀΑΒΕΖΗΙΚΜΝΟΡΤΥΧI",
    "ABEKMHOPCTYXSlJlABEZHlKMNOPTYXl",
)
"""Cyrillic and Greek capitals that look like Latin ones, and all that look like a small L."""


def clean_label(text: object) -> str:
    """A label in Unicode's composed form (NFC), as macOS's file names are not, without spaces at its ends."""
    return unicodedata.normalize("NFC", printable(str(text))).strip()


def looks_of(label: str) -> tuple[str, str]:
    """Two texts, of which labels share one that differ by case, spaces or look-alike characters alone.

    The first is of its letters in any case, the second of its capitals' shapes, as Cyrillic `В` is Latin `B`. A sign or
    space before a number, as in -1, or between two numbers stays, for without it they are others.
    """
    text = re.sub(r"(^|(?<=\d))[-_\s]+(?=\d)", "\N{MINUS SIGN}", unicodedata.normalize("NFKC", label))
    bare = "".join(c for c in text if unicodedata.category(c)[0] not in "ZC" and c not in "-_")
    return bare.casefold().translate(LOOKALIKES), bare.translate(CAPITALS).casefold().translate(LOOKALIKES)


def warn_of_lookalikes(classes: Iterable[str]) -> list[str]:
    """A warning for each group of classes that look the same."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        group = list(dict.fromkeys([*(other for look in looks_of(name) for other in alike.get(look, ())), name]))
        alike |= {look: group for member in group for look in looks_of(member)}
    return [
        f"warning: classes differ by case, spaces or look-alike characters alone: {quoted(names)}; "
        "if they are one, give them one name"
        for names in {id(group): group for group in alike.values()}.values()
        if len(names) > 1
    ]


def no_label(labels: Iterable[int | str]) -> int | str | None:
    """The label, number or text, that stands for none: -1, but where -1 and 1 are the two classes; None without it."""
    written = {str(label).removesuffix(".0"): label for label in labels}
    return written["-1"] if "-1" in written and written.keys() != {"-1", "1"} else None


def as_whole(labels: Collection[str]) -> dict[str, str]:
    """What labels become of which all are whole numbers, some written with a fraction of zeros: `1.0` is `1`.

    So pandas writes a column of integers in which a cell was empty. Where any label is something else, and where -1
    stands for none, all stay as they are written.
    """
    if no_label(labels) is not None or not all(re.fullmatch(r"-?\d+(\.0+)?", label) for label in labels):
        return {}
    return {label: label.partition(".")[0] for label in labels if "." in label}


def warn_of_missing(classes: Iterable[str]) -> list[str]:
    """A warning where a class is called what programs write for a missing value, or people for none."""
    classes = [*classes]
    unlabelled = re.compile(r"nan|<na>|#?n/a|null|(un|not)[ _-]?(labell?ed|classified|sorted|annotated)|no[ _-]?label")
    missing = [name for name in classes if unlabelled.fullmatch(name.casefold())]
    missing += [str(label) for label in [no_label(classes)] if label is not None]
    return [f"warning: {quoted(missing)} is a class here, and may stand for a missing label"] if missing else []


def number_labels(
    where: str, names: Sequence[str], labels: Sequence[int | str], classes: Sequence[str] = ()
) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and int64 labels (N,).

    Args:
        where: the data, for messages.
        names: of the images (N,), for messages.
        labels: an integer or a text for each image.
        classes: names of integer labels; without them the distinct labels, in order, are the classes.

    Raises:
        InputError: a label is empty, has no name, or is -1, which stands for no label.
    """
    labels = [clean_label(label) if isinstance(label, str) else label for label in labels]
    if empty := set(labels) & {"", None}:
        name = names[labels.index(empty.pop())]
        raise InputError(f"{where}: {name!r} has an empty label; name its class, or take unlabelled images away")
    if not classes:
        distinct = sorted(set(labels))
        if (label := no_label(distinct)) is not None:
            raise InputError(
                f"{where}: {names[labels.index(label)]!r} has label {label}, which stands for no label; "
                "take unlabelled images away"
            )
        texts = [label for label in distinct if isinstance(label, str)]
        whole = as_whole(texts) if len(texts) == len(distinct) else {}
        labels = [whole.get(label, label) if isinstance(label, str) else label for label in labels]
        number = {label: index for index, label in enumerate(sorted(set(labels)))}
        return tuple(map(str, number)), np.array([number[x] for x in labels], np.int64)
    numbers = np.array(labels, dtype=np.int64)
    outside = np.flatnonzero((numbers < 0) | (numbers >= len(classes)))
    if len(outside):
        raise InputError(
            f"{where}: {names[outside[0]]!r} has label {numbers[outside[0]]}, none of the {len(classes)} class "
            "names; add its name, or take unlabelled files away"
        )
    return tuple(map(clean_label, classes)), numbers
