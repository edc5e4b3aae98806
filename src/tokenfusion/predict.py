"""Predictions of many files, printed as a table, JSON or CSV."""

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from tokenfusion.classifier import Prediction
from tokenfusion.data.trees import is_image


def expand(paths: Sequence[str]) -> Iterator[str]:
    """Files named by files, folders (all images below them), globs, or - (a path a line on standard input).

    A name that stands for nothing is passed on as it is, so that it gets an entry with an error.
    """
    for path in paths:
        if path == "-":
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="surrogateescape")  # a path may be any bytes
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
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


def print_predictions(predictions: Iterable[Prediction], output: str, console: Console) -> int:
    """Print as "table", "json" or "csv"; returns how many images failed."""
    failed = 0

    def counted() -> Iterator[Prediction]:
        nonlocal failed
        for prediction in predictions:
            failed += bool(prediction.error)
            yield prediction

    PRINTERS[output](counted(), console)
    return failed


def print_json(predictions: Iterable[Prediction], console: Console) -> None:
    """A JSON object a line."""
    del console  # plain lines, for a program to read
    for prediction in predictions:
        print(json.dumps(prediction.to_dict(), ensure_ascii=False, allow_nan=False), flush=True)


def print_csv(predictions: Iterable[Prediction], console: Console) -> None:
    """`path,label,score,error` lines."""
    del console
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "label", "score", "error"])
    for prediction in predictions:
        if prediction.error:
            writer.writerow([prediction.path, "", "", prediction.error])
        else:
            writer.writerow([prediction.path, prediction.label, f"{prediction.score:.6f}", ""])


def print_table(predictions: Iterable[Prediction], console: Console) -> None:
    """A table to read."""
    table = Table("image", "label", box=None, pad_edge=False)
    table.add_column("score", justify="right")
    table.add_column("then")
    for prediction in predictions:
        if prediction.error:
            table.add_row(prediction.path, "", "", f"error: {prediction.error}")
        else:
            others = ", ".join(f"{label} {score:.1%}" for label, score in prediction.topk[1:])
            table.add_row(prediction.path, prediction.label, f"{prediction.score:.1%}", others)
    console.print(table, soft_wrap=False)


PRINTERS: dict[str, Callable[[Iterable[Prediction], Console], None]] = {
    "table": print_table,
    "json": print_json,
    "csv": print_csv,
}
