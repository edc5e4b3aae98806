"""Predictions printed as a table, JSON or CSV."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenfusion_runtime.prediction import Prediction


def print_predictions(
    predictions: Iterable[Prediction],
    output: str,
    *,
    topk: int,
    multi_label: bool = False,
    widths: Sequence[int] = (),
) -> int:
    """Print as "table", "json" or "csv", each row when it is known; returns how many images failed.

    Args:
        predictions: each with `topk` classes, or an error.
        output: how to print them.
        topk: how many classes a prediction names.
        multi_label: whether an image has any number of classes.
        widths: of the table's first columns, where they are known before it begins; they grow where need be.
    """
    names, failed = headings(multi_label), 0
    wide = [*widths, *[24, *[0] * (len(names) - 1)][len(widths) :]]
    if output == "table":
        print_row(names, wide)
    columns = csv_columns(topk, multi_label)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if output == "csv":
        writer.writerow(["path", *columns, "error"])
    for prediction in predictions:
        failed += bool(prediction.error)
        if output == "json":
            print(json_text(prediction.to_dict()), flush=True)
        elif output == "csv":
            cells = csv_cells(prediction) or [""] * len(columns)
            writer.writerow([prediction.path, *cells, prediction.error])
        else:
            print_row(table_cells(prediction, len(names)), wide)
    return failed


def noting_unsure(predictions: Iterable[Prediction], noted: list[str]) -> Iterator[Prediction]:
    """Predictions as they come; the paths of images that the model is too unsure of are noted."""
    for prediction in predictions:
        if prediction.abstains:
            noted.append(prediction.path)
        yield prediction


CONTROL_CHARACTERS = list(map(chr, (*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))))
"""What could move a terminal's cursor, end a line or turn its direction."""
SPELLED_OUT = {ord(character): repr(character)[1:-1] for character in CONTROL_CHARACTERS}
SPELLED_OUT_BUT_LAYOUT = {code: text for code, text in SPELLED_OUT.items() if chr(code) not in "\n\t"}
ESCAPED = {code: f"\\u{code:04x}" for code in (*SPELLED_OUT_BUT_LAYOUT, *range(0xD800, 0xE000))}


def first_widths(images: Iterable[str], classes: Sequence[str], multi_label: bool) -> list[int]:
    """Widths of the table's columns that are known before it begins: of names of images, if these are a list, and of
    classes, if an image has one."""
    if not isinstance(images, list):
        return []
    return [max(map(len, names)) for names in (images, classes)][: 1 if multi_label else 2]


def spelled_out(text: str, layout: bool = False) -> str:
    r"""A text whose control characters are spelled out, such as \x1b; with `layout`, lines and tabs stay."""
    return text.translate(SPELLED_OUT_BUT_LAYOUT if layout else SPELLED_OUT)


def json_text(value: Any, indent: int | None = None) -> str:
    r"""JSON in which what could move a terminal's cursor, or is half of a character, is written as \u009b."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent).translate(ESCAPED)


def print_row(cells: Sequence[str], widths: list[int]) -> None:
    """Print a row at once; columns are as wide as the widest cell so far, and control characters are spelled out."""
    shown = list(map(spelled_out, cells))
    widths[:] = map(max, widths, map(len, shown))
    print("  ".join(map(str.ljust, shown, widths)).rstrip(), flush=True)


def csv_columns(topk: int, multi_label: bool) -> list[str]:
    """`label,score,label_2,score_2,...`, a pair for each of `topk` classes.

    Of multi-label models `labels,scores,label_1,score_1,...`: those that reach their thresholds, with `|` in between,
    then the likeliest ones, whether they do or not.
    """
    ranked = [f"{what}_{rank}" for rank in range(1, topk + 1) for what in ("label", "score")]
    return ["labels", "scores", *ranked] if multi_label else ["label", "score", *ranked[2:]]


def csv_cells(prediction: Prediction) -> list[str]:
    """What stands in these columns; nothing of an image that could not be read."""
    cells = [cell for label, score in prediction.topk for cell in (label, f"{score:.6f}")]
    if prediction.labels is None:
        return ["", *cells[1:]] if prediction.abstains else cells
    reached, scores = zip(*prediction.labels, strict=True) if prediction.labels else ((), ())
    return ["|".join(reached), "|".join(f"{score:.6f}" for score in scores), *cells]


def headings(multi_label: bool) -> list[str]:
    """Of the table's columns."""
    return ["image", "labels", "below their thresholds"] if multi_label else ["image", "label", "score", "then"]


def table_cells(prediction: Prediction, columns: int) -> list[str]:
    """A row of it."""
    if prediction.error:
        return [prediction.path, *[""] * (columns - 2), f"error: {prediction.error}"]
    if prediction.labels is None:
        then = scores_text(prediction.topk[not prediction.abstains :])
        return [prediction.path, prediction.label or "unsure", f"{prediction.topk[0][1]:.1%}", then]
    others = [(label, score) for label, score in prediction.topk if (label, score) not in prediction.labels]
    below = (f"{label} {score:.1%} < {prediction.thresholds[label]:.1%}" for label, score in others)
    return [prediction.path, scores_text(prediction.labels), ", ".join(below)]


def scores_text(rows: Iterable[tuple[str, float]]) -> str:
    """Classes and their scores, such as `cat 91.2%, dog 5.0%`."""
    return ", ".join(f"{label} {score:.1%}" for label, score in rows)
