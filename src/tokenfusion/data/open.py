"""Any kind of data as a Dataset: the one file that knows all the kinds."""

import difflib
import os
from pathlib import Path

from tokenfusion.data.dataset import KINDS, Dataset, printable, quoted
from tokenfusion.data.exclude import EXCLUDED, leave_out, paths_in, read_list
from tokenfusion.errors import InputError


def open_dataset(data: str | Path, exclude: str = "", run: Path | None = None) -> Dataset:
    """Open labelled images of any supported kind; their pixels are read later, when they are decoded.

    Args:
        data: a folder with a subfolder per class (with `train/` and `val/` or `test/` above them, or without), a folder
            of Parquet files or one of them, a CSV or JSONL with `path`, `label` or `labels`, and perhaps `split` and
            `weight`, a tar, shards (a folder of tars, a pattern in braces or a URL, see `data/shards.py`), or `digits`.
        exclude: a CSV with a column `path`, as `tokenfusion check` writes it, names as it prints them; "" for none.
            The images that it names are left out; those that the data does not have are counted.
        run: a run folder, whose own copy of the list is read in its place if there is one.

    Raises:
        InputError: the data or the list cannot be read, there is nothing usable, the data has none of the list's
            paths, or the list leaves nothing of a split; the message says which.
    """
    dataset = open_place(data)
    if not exclude:
        return dataset
    path = run / EXCLUDED if run and (run / EXCLUDED).exists() else Path(exclude)
    return leave_out(dataset, paths_in(read_list(path), str(path)), exclude)


def open_place(data: str | Path) -> Dataset:
    """Everything that lies in a place."""
    # The kinds are imported when they are met: pyarrow and scikit-learn take a second.
    from tokenfusion.data import digits, lists, parquet, shards, trees

    if str(data) == "digits":
        return digits.open_digits()
    if shards.names_shards(str(data)):
        return shards.open_shards(str(data))
    path = Path(data)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder; {nearest(path)}")
    if path.is_dir():
        files, folders = trees.walk(path)
        tables = [file for file in files if file.endswith(".parquet")]
        images = trees.read_tree(files, folders).files
        if tables and images:
            raise InputError(
                f"{path}: holds both Parquet files ({quoted(tables[:1])}) and images in class folders "
                f"({quoted(map(printable, images[:1]))}); move one kind elsewhere"
            )
        if any(file.endswith(".tar") for file in files) and not (tables or images):
            return shards.open_shards(str(path))
        if tables:
            return parquet.open_parquet(path, tables, [file for file in files if not file.endswith(".parquet")])
        return trees.open_folder(path, files, folders)
    name = path.name.lower()
    if name.endswith(".parquet"):
        return parquet.open_parquet(path.parent, [path.name])
    if name.endswith((".csv", ".jsonl", ".ndjson")):
        return lists.open_list(path)
    if name.endswith(".tar") and shards.is_webdataset(path):
        return shards.open_shards(str(path))
    if ".tar" in path.suffixes or name.endswith((".tgz", ".txz", ".tbz2")):
        return trees.open_tar(path)
    raise InputError(f"{path}: not a kind of data that is known here; give {KINDS}")


def resolved(data: str) -> str:
    """DATA named so that it means the same from any folder."""
    if "{" in data and "://" not in data:
        return os.path.abspath(data)
    return str(Path(data).resolve()) if data != "digits" and os.path.exists(data) else data


def nearest(path: Path) -> str:
    """A hint at what was meant: the names most like the missing one, in the deepest folder that does exist."""
    while not os.path.isdir(path.parent):
        path = path.parent
    found = sorted(os.listdir(path.parent))
    close = difflib.get_close_matches(path.name, found, n=3) or found[:3]
    return f"{path.parent} has: {quoted(close)}" if close else f"{path.parent} is empty"
