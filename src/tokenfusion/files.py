"""Files that are written whole or not at all."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenfusion.errors import InputError


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and rename it into place.

    Whatever happens on the way (a kill, a full disk, an exception), `path` holds its old bytes or all of its new ones.

    Args:
        path: the file to replace; its folder must exist.
        write: called with the temporary file's path.

    Raises:
        InputError: it cannot be written, as on a full disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise InputError(
            f"{path} could not be written: {error}; what was there before is intact: make room or name another folder, "
            "then run the command again (training goes on with `tokenfusion train --resume RUN`)"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file under a line of headings, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text)  # with lines that end in \n alone, a \r in a cell would not be quoted
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def make_folder(path: Path) -> None:
    """Make a folder where it is missing.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; give another --out") from error


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file; `remedy` is what to do where it is damaged.

    Raises:
        InputError: it is.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); {remedy}") from error


def read_json_lines(path: Path) -> list[Any]:
    """Read a file of a JSON value a line, such as a run's `metrics.jsonl`.

    Raises:
        InputError: it is gone, or a line is damaged.
    """
    values = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; train again") from error
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path} line {number} is not JSON ({error}); remove the line, or train again") from error
    return values


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
