"""A table in a text file: encoding, separator and header as they are found. The cells are read by Python's csv, which
keeps the line of each row for messages and refuses quotes that do not end."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile
from pathlib import Path
from typing import Any

from tokenfusion.data.annotations import is_coco, refuse_others, rows_of_coco
from tokenfusion.data.column_names import names_paths
from tokenfusion.data.decode import is_image
from tokenfusion.data.encoding import decode_text
from tokenfusion.data.split_names import split_named
from tokenfusion.errors import InputError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}
"""In the order in which they are tried."""
SAMPLE_LINES = 50
LONGEST_LINE = 2**20
"""Most bytes of a line."""
ROW_NAMES = "row names"
"""What the first column is called where the first line names all others only, as R and CelebA write it."""
LARGEST_JSON = 2**28
"""Most bytes of a JSON that is one value."""
LONGEST_PATH = 4096
"""Most characters of a path; no file system takes a longer one."""


@dataclass(frozen=True)
class Table:
    """Rows of a text file."""

    where: str
    columns: tuple[str, ...]
    rows: list[tuple[str, dict[str, Any]]]
    """Each row's place, for messages, and its cells by column; those of JSON are of any type."""
    header: bool = True
    """Whether the file names its columns; where not they are called `column 1` and so on."""
    notes: tuple[str, ...] = ()

    def texts(self, column: str) -> set[str]:
        """The values in a column as texts, "" for none."""
        return {"" if (value := row.get(column)) is None else str(value).strip() for _, row in self.rows}


def read_table(path: Path, encoding: str = "") -> Table:
    """Read a CSV, a TSV, a text file of columns, a JSON or a JSONL, as its name ends.

    Args:
        path: of the file.
        encoding: of what is in no UTF; "" to guess.

    Raises:
        InputError: it cannot be read, or is none.
    """
    try:
        refuse_large(path)
        text, encoding, guess = decode_text(path.read_bytes(), encoding)
        encoding += f" ({guess})" * bool(guess)
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            rows = [(f"{path}, line {line}", row) for line, row in read_jsonl(path, text)]
            return with_note(of_rows(path, rows), f"{path.name}: read as {encoding}" * bool(guess))
        if path.suffix.lower() == ".json":
            return with_note(read_json(path, text), f"{path.name}: read as {encoding}" * bool(guess))
        return read_separated(path, text, encoding)
    except InputError as error:
        raise error if str(error).startswith(str(path)) else InputError(f"{path}: {error}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a text file, best in UTF-8") from error


def with_note(table: Table, note: str) -> Table:
    """A table that says one thing more, if that is anything."""
    return replace(table, notes=(note, *table.notes)) if note else table


def refuse_large(path: Path) -> None:
    """Refuse what would fill the memory, before it is read: a JSON that is one huge value, or a line without an end.

    Raises:
        InputError: naming the line.
    """
    if path.suffix.lower() == ".json":
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise InputError(f"{path}: {size:,} bytes, more than {LARGEST_JSON:,} of one JSON; write a JSONL")
        return
    with path.open("rb") as file:
        number, length = 1, 0
        while part := file.readline(LONGEST_LINE):
            length += len(part)
            if length > LONGEST_LINE:
                raise InputError(f"{path}, line {number}: more than {LONGEST_LINE:,} bytes; give an image a line")
            if part.endswith(b"\n"):
                number, length = number + 1, 0


def read_separated(path: Path, text: str, encoding: str) -> Table:
    skipped = 0
    said = re.match(r'"?sep=(.)"?\r?\n', text, re.IGNORECASE)
    if said:  # as Excel writes it
        text, skipped = text[said.end() :], 1
    elif counted_rows(text):  # as CelebA has it
        text, skipped = text[len(text.splitlines(keepends=True)[0]) :], 1
    text, remarks = without_remarks(text)
    skipped += remarks
    separator = said[1] if said else sniff(text, path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    lines = [(reader.line_num + skipped, cells) for cells in reader]
    if separator == " ":  # lines that end with it have no cell behind it
        lines = [(line, cells[:-1] if cells and not cells[-1] else cells) for line, cells in lines]
    lines = list(dropwhile(lambda line: not any(cell.strip() for cell in line[1]), lines))
    if not lines:
        raise InputError(f"{path}: its first line is empty; it must name the columns, such as path,label")
    first = [cell.strip() for cell in lines[0][1]]
    header = not any(is_image(cell) or "://" in cell for cell in first)
    if header and has_row_names(len(first), [cells for _, cells in lines[1:] if cells]):
        first = [ROW_NAMES, *first]
    columns = tuple(first) if header else tuple(f"column {number}" for number in range(1, len(first) + 1))
    refuse_twice(path, columns)
    rows = []
    for line, cells in lines[1:] if header else lines:
        if len(cells) > len(columns) and any(cells[len(columns) :]):
            raise InputError(
                f"{path}, line {line}: {len(cells)} cells, where the first line has {len(columns)}; put cells with a "
                f"{separator!r} in them in double quotes"
            )
        if any(cell.strip() for cell in cells):  # Excel writes rows of separators alone
            padded = [*cells, *[None] * len(columns)]
            rows.append((f"{path}, line {line}", dict(zip(columns, padded, strict=False))))
    usual = encoding == "utf-8" and separator == "," and header and not said
    found = f"read as {encoding}, separated by {SEPARATORS.get(separator, repr(separator))}"
    found += ", without a header" * (not header)
    return Table(str(path), columns, rows, header, () if usual else (f"{path.name}: {found}",))


def without_remarks(text: str) -> tuple[str, int]:
    """A text without the remarks (#) above its table, and how many lines these are, empty ones among them included.

    The last of them is no remark where it names a column of paths, as `#path,label` does, and the next line does not.
    """
    above: list[str] = []
    line = ""
    for line in (match[0] for match in re.finditer(r"[^\r\n]*(?:\r\n?|\n)", text)):
        if line.strip() and not is_remark(line):
            break
        above.append(line)
    last, after = (re.split(r"[,;\t|]", cells) for cells in (above[-1] if above else "", line))
    if len(last) > 1 and names_paths(last) and not names_paths(after):
        above.pop()
    return text[sum(map(len, above)) :], len(above)


def is_remark(line: str) -> bool:
    """Whether a line begins with # and is none of an image called so; Excel quotes one with a comma in it."""
    if line.startswith('"#') and line.count('"') % 2 == 0:
        line = line.strip()[1:]
    elif not line.startswith("#"):
        return False
    first, word = re.split(r'[",;\t|]', line)[0], line.split()[0]
    return line.startswith("# ") or not (is_image(first.strip()) or is_image(word))


def has_row_names(columns: int, rows: list[list[str]]) -> bool:
    """Whether the header names all columns but the first, which numbers the rows (R), or names images beside columns of
    -1, 0 and 1 (CelebA)."""
    if not rows or {len(cells) for cells in rows} != {columns + 1}:
        return False
    numbered = all(cells[0].isdecimal() for cells in rows) and any(cells[-1] for cells in rows)
    return numbered or all(is_image(cells[0]) and {*cells[1:]} <= {"-1", "0", "1"} for cells in rows)


def counted_rows(text: str) -> bool:
    """Whether the first line is the number of the rows, behind the line that names the columns."""
    first, *others = [line for line in text.splitlines() if line.strip()] or [""]
    return first.strip().isdecimal() and int(first) == len(others) - 1


def refuse_twice(path: Path | str, columns: Sequence[str]) -> None:
    """Refuse columns of one name."""
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise InputError(f"{path}: several columns are called {', '.join(map(repr, twice))}; give each its own name")


def sniff(text: str, path: Path) -> str:
    """The separator that cuts the first lines into the same number of cells, two or more; else what cuts the first."""
    head = "".join(text.splitlines(keepends=True)[:SAMPLE_LINES])
    order = [*SEPARATORS]
    if path.suffix.lower() in (".tsv", ".tab"):
        order = ["\t", *(separator for separator in order if separator != "\t")]
    ragged = ""
    for separator in order:
        reader = csv.reader(io.StringIO(head, newline=""), delimiter=separator, skipinitialspace=True)
        try:
            counts = [len(row) for row in reader if row]
        except csv.Error:
            continue
        if counts and counts[0] > 1 and (len(set(counts)) == 1 or {*counts[1:]} == {counts[0] + 1}):
            return separator
        ragged = ragged or separator * bool(counts and counts[0] > 1 and separator != " ")
    return ragged or ","


def read_jsonl(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {line}: not JSON ({error}); give one object per line") from error
        if not isinstance(row, dict):
            raise InputError(f'{path}, line {line}: {content.strip()[:40]!r} is not like {{"path": …, "label": …}}')
        rows.append((line, row))
    return rows


def read_json(path: Path, text: str) -> Table:
    """A list of objects or of lists; one alone under a name; labels by paths, or lists of paths by labels; or columns,
    as pandas writes them."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); give a list of objects with path and label") from error
    if is_coco(value):
        rows, said = rows_of_coco(path, value)
        table = of_rows(path, [(f"{path}, image {number}", row) for number, row in enumerate(rows, start=1)])
        return with_note(table, f"{path.name}: read as COCO's format: {said}")
    refuse_others(path, value)
    if isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), list):
        (value,) = value.values()
    if isinstance(value, dict) and value and all(map(split_named, value)):
        value = rows_of_splits(path, value)
    if isinstance(value, dict) and value and all(isinstance(cells, dict) for cells in value.values()):
        keys = dict.fromkeys(key for cells in value.values() for key in cells)
        value = [{column: cells.get(key) for column, cells in value.items()} for key in keys]
    if isinstance(value, dict) and value and all(isinstance(label, str | int) for label in value.values()):
        value = [{"path": name, "label": label} for name, label in value.items()]
    if isinstance(value, dict) and value and all(isinstance(names, list) for names in value.values()):
        if all(is_image(name) for name in value):
            value = [{"path": name, "labels": labels} for name, labels in value.items()]
        elif all(isinstance(name, str) and is_image(name) for names in value.values() for name in names):
            value = [{"path": name, "label": label} for label, names in value.items() for name in names]
    if isinstance(value, dict) and isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        value = [value["columns"], *value["data"]]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        if isinstance(value, list) and all(isinstance(row, list) and len(row) == len(value[0]) > 1 for row in value):
            return of_lists(path, value)
        raise InputError(f'{path}: is not like [{{"path": …, "label": …}}, …]; give a list of such objects')
    return of_rows(path, [(f"{path}, entry {number}", row) for number, row in enumerate(value, start=1)])


def rows_of_splits(path: Path, value: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a JSON that has a list of objects, or labels by paths, for each split."""
    rows: list[dict[str, Any]] = []
    for split, part in value.items():
        if isinstance(part, dict) and all(isinstance(label, str | int) for label in part.values()):
            part = [{"path": name, "label": label} for name, label in part.items()]
        if not isinstance(part, list) or not all(isinstance(row, dict) for row in part):
            raise InputError(
                f"{path}: {split!r} is the name of a split, not of a class, and holds no labels; give a list like "
                '[{"path": …, "label": …}, …] for each split'
            )
        rows += [row | {"split": split} for row in part]
    return rows


def of_lists(path: Path, lines: list[list[Any]]) -> Table:
    """A table of lines, the first of which names the columns unless it names an image."""
    header = all(isinstance(cell, str) and not is_image(cell) and "://" not in cell for cell in lines[0])
    columns = tuple(lines[0]) if header else tuple(f"column {number}" for number in range(1, len(lines[0]) + 1))
    refuse_twice(path, columns)
    rows = [(f"{path}, entry {n}", dict(zip(columns, cells, strict=True))) for n, cells in enumerate(lines, start=1)]
    return Table(str(path), columns, rows[header:], header, (f"{path.name}: without a header",) * (not header))


def of_rows(path: Path, rows: list[tuple[str, dict[str, Any]]]) -> Table:
    return Table(str(path), tuple(dict.fromkeys(name for _, row in rows for name in row)), rows)
