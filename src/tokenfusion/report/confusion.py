"""Which classes are taken for which: the confusion matrix as the report draws it, and its commonest mistake."""

import unicodedata
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_CONFUSED = 30
"""Classes that the confusion matrix shows at most."""


class Heatmap(NamedTuple):
    """The confusion matrix, or its most confused part.

    Attributes:
        names: of the classes shown.
        labels: the same, short enough for a heading and all different.
        told_by_number: label and name of those that only a number tells apart.
        total: classes before the choice.
        rows: count of each cell and its share of the true class's images.
    """

    names: list[str]
    labels: list[str]
    told_by_number: list[tuple[str, str]]
    total: int
    rows: list[list[tuple[int, float]]]


def draw_heatmap(classes: list[str], confusion: NDArray[np.int64], limit: int = MAX_CONFUSED) -> Heatmap:
    """The confusion matrix of the classes that take part in most mistakes, in the order of the classes.

    Args:
        classes: K names.
        confusion: (K, K) counts, rows truth.
        limit: classes to keep.
    """
    mistakes = confusion.sum(0) + confusion.sum(1) - 2 * np.diag(confusion)
    chosen = np.sort(np.argsort(-mistakes, kind="stable")[:limit])
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    cells = [[(int(confusion[i, j]), float(shares[i, j])) for j in chosen] for i in chosen]
    names = [classes[i] for i in chosen]
    labels = headings(names)
    numbered = [(label, name) for label, name in zip(labels, names, strict=True) if label != shortened(name)]
    return Heatmap(names=names, labels=labels, told_by_number=numbered, total=len(classes), rows=cells)


def headings(names: list[str]) -> list[str]:
    """Names shortened, of which those that would then be the same are told apart by a number."""
    short = [shortened(name) for name in names]
    return [
        f"{name[: -len(number)]}{number}" if short.count(name) > 1 else name
        for index, name in enumerate(short)
        for number in [f"#{short[: index + 1].count(name)}"]
    ]


def shortened(name: str, widest: int = 26) -> str:
    """A name that is no wider than so many letters, shortened in the middle; a letter of Chinese is as wide as two."""
    wide = ["WF".count(unicodedata.east_asian_width(letter)[0]) + 1 for letter in name]
    if sum(wide) <= widest:
        return name
    half = widest // 2
    start = sum(total <= half - 1 for total in accumulate(wide))
    end = sum(total <= half for total in accumulate(reversed(wide)))
    return f"{name[:start]}…{name[len(name) - end :]}"


def commonest_confusion(confusion: NDArray[np.int64]) -> tuple[int, int, int]:
    """True class, predicted class and count of the commonest mistake."""
    mistakes = off_diagonal(confusion)
    truth, taken = divmod(int(mistakes.argmax()), len(confusion))
    return truth, taken, int(mistakes[truth, taken])


def off_diagonal(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """The mistakes of a confusion matrix (K, K)."""
    return confusion - np.diag(np.diag(confusion))
