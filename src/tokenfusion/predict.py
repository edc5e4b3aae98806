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

from tokenfusion.classifier import Prediction
from tokenfusion.data.decode import is_image


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
    """Print as "table", "json" or "csv"; returns how many images failed.

    Args:
        predictions: each with `topk` classes, or an error.
        output: how to print them.
        console: where a table goes.
        topk: how many classes a prediction names.
        multi_label: whether an image has any number of classes.
    """
    failed = 0

    def counted() -> Iterator[Prediction]:
        nonlocal failed
        for prediction in predictions:
            failed += bool(prediction.error)
            yield prediction

    if output == "json":
        print_json(counted())
    elif output == "csv":
        print_csv(counted(), topk, multi_label)
    else:
        print_table(counted(), console, multi_label)
    return failed


def print_json(predictions: Iterable[Prediction]) -> None:
    """A JSON object a line."""
    for prediction in predictions:
        print(json.dumps(prediction.to_dict(), ensure_ascii=False, allow_nan=False), flush=True)


def print_csv(predictions: Iterable[Prediction], topk: int, multi_label: bool) -> None:
    """`path,label,score,label_2,score_2,...,error` lines, with `topk` labels and their scores.

    Of multi-label models `path,labels,scores,label_1,score_1,...,error`, with `|` between the classes that reach their
    thresholds; the likeliest ones follow whether they do or not.
    """
    writer = csv.writer(sys.stdout, lineterminator="\n")
    ranked = [f"{what}_{rank}" for rank in range(1, topk + 1) for what in ("label", "score")]
    columns = ["labels", "scores", *ranked] if multi_label else ["label", "score", *ranked[2:]]
    writer.writerow(["path", *columns, "error"])
    for prediction in predictions:
        cells = [cell for label, score in prediction.topk for cell in (label, f"{score:.6f}")]
        if prediction.labels is not None:
            names = "|".join(label for label, _ in prediction.labels)
            cells = [names, "|".join(f"{score:.6f}" for _, score in prediction.labels), *cells]
        writer.writerow([prediction.path, *(cells or [""] * len(columns)), prediction.error])


def print_table(predictions: Iterable[Prediction], console: Console, multi_label: bool) -> None:
    """A table to read."""
    table = Table("image", "labels" if multi_label else "label", box=None, pad_edge=False)
    if not multi_label:
        table.add_column("score", justify="right")
    table.add_column("below their thresholds" if multi_label else "then")
    for prediction in predictions:
        if prediction.error:
            blank = [""] if multi_label else ["", ""]
            table.add_row(prediction.path, *blank, f"error: {prediction.error}")
        elif prediction.labels is not None:
            limits, others = prediction.thresholds, [row for row in prediction.topk if row not in prediction.labels]
            below = ", ".join(f"{label} {score:.1%} < {limits[label]:.1%}" for label, score in others)
            table.add_row(prediction.path, listed(prediction.labels), below)
        else:
            table.add_row(prediction.path, prediction.label, f"{prediction.score:.1%}", listed(prediction.topk[1:]))
    console.print(table, soft_wrap=False)


def listed(rows: Iterable[tuple[str, float]]) -> str:
    """Classes and their scores, such as `cat 91.2%, dog 5.0%`."""
    return ", ".join(f"{label} {score:.1%}" for label, score in rows)
