"""Images that are left out because a list says so."""

import csv
import io
from dataclasses import replace
from pathlib import Path

from tokenfusion.data.dataset import Dataset, quoted
from tokenfusion.data.usable import require_usable
from tokenfusion.errors import InputError
from tokenfusion.files import write_bytes
from tokenfusion.formatting import counted

EXCLUDED = "excluded.csv"
"""A run's own copy of its list: the run needs the file that was given no more."""


def keep_list(run: Path, exclude: str) -> None:
    """Copy a list into a run folder.

    Raises:
        InputError: it cannot be read, or is no such list.
    """
    content = read_list(Path(exclude))  # once: it may be a pipe
    paths_in(content, exclude)
    write_bytes(run / EXCLUDED, content)


def leave_out(dataset: Dataset, paths: set[str], exclude: str) -> Dataset:
    """A dataset without the images of some paths; `exclude` is what messages call these.

    Raises:
        InputError: the dataset has none of them, or nothing of a split is left.
    """
    where = dataset.where
    unknown = len(paths - set(dataset.names))
    if paths and unknown == len(paths):
        raise InputError(
            f"{exclude}: nothing that it names ({counted(unknown, 'path')}) is in {where}; it has "
            f"{quoted(sorted(paths)[:1])}, and the data {quoted(dataset.names[:1])}: give the list of this data"
        )
    left = dataset.subset([index for index, name in enumerate(dataset.names) if name not in paths])
    gone = [name for name in dict.fromkeys(dataset.splits) if name not in left.splits]
    if gone:
        part = f"of {gone[0]} in {where}" if len(left) else f"of {where}"
        raise InputError(f"{exclude}: it names every image {part}; take some out of the list")
    excluded = f"{counted(len(dataset) - len(left), 'image')} excluded"
    excluded += f"; not in the data: {counted(unknown, 'path')} of the list" * bool(unknown)
    return require_usable(replace(left, excluded=excluded))


def read_list(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(str(path), error) from error


def paths_in(content: bytes, where: str) -> set[str]:
    """The column `path` of a CSV; `where` is what messages call it."""
    return set(reasons_in(content, where))


def reasons_in(content: bytes, where: str) -> dict[str, str]:
    """The paths of a CSV in its order, each with what a column `reason` says, "" where there is none."""
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        columns = reader.fieldnames or []
        if "path" not in columns:
            raise InputError(f"{where}: its first line is {list(columns)}; it must name a column path")
        return {row["path"]: row.get("reason") or "" for row in reader if row["path"]}
    except (UnicodeDecodeError, csv.Error) as error:
        raise unreadable(where, error) from error


def unreadable(where: str, error: Exception) -> InputError:
    return InputError(f"{where}: cannot be read ({error}); give the quarantine.csv that check wrote")
