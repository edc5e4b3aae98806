"""Any kind of data as a Dataset: the one file that opens all the kinds."""

import os
from pathlib import Path

from tokenfusion.data.dataset import KINDS, Dataset, printable, quoted
from tokenfusion.data.exclude import EXCLUDED, leave_out, paths_in, read_list
from tokenfusion.data.folder import open_folder, read_tree
from tokenfusion.data.groups import group_by
from tokenfusion.data.ignored import why_ignored
from tokenfusion.data.kinds import Kind, files_below, kind_of
from tokenfusion.data.readers import refuse_pointer
from tokenfusion.data.usable import require_usable, without_empty, without_rare
from tokenfusion.errors import InputError
from tokenfusion.places import require_data
from tokenfusion.recipe import Reading


def open_dataset(
    data: str | Path,
    exclude: str = "",
    run: Path | None = None,
    reading: Reading = Reading(),  # noqa: B008 - frozen
) -> Dataset:
    """Open labelled images of any supported kind; their pixels are read later, when they are decoded.

    Args:
        data: a folder with a subfolder per class, a folder of Parquet files or one of them, a list, a tar, shards (a
            folder of tars, a pattern in braces or a URL), or `digits`; docs/data.md says how each is read.
        exclude: a CSV with a column `path`, as `tokenfusion check` writes it, names as it prints them; "" for none.
            The images that it names are left out; those that the data does not have are counted.
        run: a run folder, whose own copy of the list is read in its place if there is one.
        reading: how to understand the data where it does not say.

    Raises:
        InputError: the data or the list cannot be read, there is nothing usable, the data has none of the list's
            paths, or the list leaves nothing of a split; the message says which.
    """
    dataset = group_by(without_empty(require_usable(open_place(data, reading))), reading.group_by)
    if exclude:
        path = run / EXCLUDED if run and (run / EXCLUDED).exists() else Path(exclude)
        dataset = leave_out(dataset, paths_in(read_list(path), str(path)), exclude)
    return without_rare(dataset) if reading.rare_classes == "drop" else dataset


def open_place(data: str | Path, reading: Reading) -> Dataset:
    """Everything that lies in a place. Each kind is imported when it is met: pyarrow and scikit-learn take a second."""
    path, kind = Path(data), kind_of(str(data))
    if kind is Kind.DIGITS:
        from tokenfusion.data.digits import open_digits

        return open_digits()
    if kind is Kind.SHARDS:
        from tokenfusion.data.shards import open_shards

        return open_shards(str(data), reading=reading)
    require_data(str(path))
    if kind is Kind.FOLDER:
        return open_below(path, reading)
    refuse_pointer(path)
    if kind is Kind.PARQUET:
        from tokenfusion.data.parquet import open_parquet

        return open_parquet(path.parent, [path.name], (), reading)
    if kind is Kind.LIST:
        from tokenfusion.data.lists import open_list

        return open_list(path, reading)
    if kind is Kind.TAR:
        return open_tar_or_shard(path, reading)
    if path.suffix.lower() in (".xlsx", ".xls", ".ods", ".numbers"):
        raise InputError(f"{path}: a spreadsheet; save it as CSV (UTF-8), and give that")
    raise InputError(f"{path}: not a kind of data that is known here; give {KINDS}")


def open_below(root: Path, reading: Reading) -> Dataset:
    """A folder of class folders, of Parquet files or of shards: what lies in it tells."""
    files, folders = files_below(root)
    tree = read_tree(files, folders) if not (lists := named_by_lists(root, files, reading)) else None
    if tree is None:
        from tokenfusion.data.lists import open_image_folder

        return open_image_folder(root, lists, files, reading)
    visible = [file for file in files if not why_ignored(file.rpartition(".")[0] + ".png")]
    tables = [file for file in visible if file.lower().endswith(".parquet")]
    if tables and tree.files:
        raise InputError(
            f"{root}: holds both Parquet files ({quoted(tables[:1])}) and images in class folders "
            f"({quoted(map(printable, tree.files[:1]))}); move one kind elsewhere"
        )
    if tables:
        from tokenfusion.data.parquet import open_parquet

        return open_parquet(root, tables, [file for file in files if file not in set(tables)], reading)
    if not tree.files and any(file.lower().endswith(".tar") for file in visible):
        from tokenfusion.data.shards import open_shards

        return open_shards(str(root), visible, reading)
    return open_folder(root, files, tree)


def named_by_lists(root: Path, files: list[str], reading: Reading) -> list[str]:
    """The metadata files of Hugging Face's image-folder layout, where these name images and labels."""
    if not any(os.path.basename(file).startswith("metadata.") for file in files):
        return []
    from tokenfusion.data.lists import metadata_lists, names_images

    lists = metadata_lists(files)
    return lists if lists and names_images(root / lists[0], reading) else []


def open_tar_or_shard(path: Path, reading: Reading) -> Dataset:
    """A tar of class folders, or a shard in the WebDataset layout."""
    from tokenfusion.data.shard_index import is_webdataset

    if path.name.lower().endswith(".tar") and is_webdataset(path):
        from tokenfusion.data.shards import open_shards

        return open_shards(str(path), reading=reading)
    from tokenfusion.data.tar import open_tar

    return open_tar(path)
