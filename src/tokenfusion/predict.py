"""Predictions of many files, printed as a table, JSON or CSV."""

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from tokenfusion.data.decode import is_image
from tokenfusion_runtime.prediction import Prediction


def expand(paths: Sequence[str]) -> Iterator[str]:
    """Files named by files, folders (all images below them), globs, or - (a path a line on standard input).

    A name that stands for nothing is passed on as it is, so that it gets an entry with an error.
    """
    for path in paths:
        if path == "-":
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="surrogateescape")  # a path may be any bytes
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        elif os.path.isdir(path):
            yield from images_below(path) or [path]
        elif os.path.exists(path):
            yield path
        else:
            yield from sorted(glob.glob(path, recursive=True)) or [path]


def images_below(folder: str) -> list[str]:
    """Every image file below a folder, in order; links to folders are not followed."""
    found = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if is_image(path))


def print_predictions(
    predictions: Iterable[Prediction], output: str, console: Console, *, topk: int, multi_label: bool = False
) -> int:
    """Print as "table", "json" or "csv", the last two line by line; returns how many images failed.

    Args:
        predictions: each with `topk` classes, or an error.
        output: how to print them.
        console: where a table goes.
        topk: how many classes a prediction names.
        multi_label: whether an image has any number of classes.
    """
    table, failed = new_table(multi_label), 0
    columns = csv_columns(topk, multi_label)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if output == "csv":
        writer.writerow(["path", *columns, "error"])
    for prediction in predictions:
        failed += bool(prediction.error)
        if output == "json":
            print(json.dumps(prediction.to_dict(), ensure_ascii=False, allow_nan=False), flush=True)
        elif output == "csv":
            cells = csv_cells(prediction) or [""] * len(columns)
            writer.writerow([prediction.path, *cells, prediction.error])
        else:
            table.add_row(*table_cells(prediction, len(table.columns)))
    if output == "table":
        console.print(table, soft_wrap=False)
    return failed


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


def new_table(multi_label: bool) -> Table:
    """A table to read, without rows."""
    table = Table("image", "labels" if multi_label else "label", box=None, pad_edge=False)
    if not multi_label:
        table.add_column("score", justify="right")
    table.add_column("below their thresholds" if multi_label else "then")
    return table


def table_cells(prediction: Prediction, columns: int) -> list[str]:
    """A row of it."""
    if prediction.error:
        return [prediction.path, *[""] * (columns - 2), f"error: {prediction.error}"]
    if prediction.labels is None:
        return [
            prediction.path,
            prediction.label or "unsure",
            f"{prediction.score:.1%}",
            scores_text(prediction.topk[not prediction.abstains :]),
        ]
    others = [(label, score) for label, score in prediction.topk if (label, score) not in prediction.labels]
    below = (f"{label} {score:.1%} < {prediction.thresholds[label]:.1%}" for label, score in others)
    return [prediction.path, scores_text(prediction.labels), ", ".join(below)]


def scores_text(rows: Iterable[tuple[str, float]]) -> str:
    """Classes and their scores, such as `cat 91.2%, dog 5.0%`."""
    return ", ".join(f"{label} {score:.1%}" for label, score in rows)
