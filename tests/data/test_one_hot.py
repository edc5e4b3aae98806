"""Columns of 0 and 1: which are classes, which mean something else, and which tell splits."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from making import png, write_parquet

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.describe import describe
from tokenfusion.data.open import open_dataset
from tokenfusion.errors import InputError

PATHS = [f"{number}.png" for number in range(6)]
ROWS = [(path, "red" if number < 3 else "grün") for number, path in enumerate(PATHS)]


def listed(folder: Path, name: str, text: str) -> Dataset:
    """A list of files that need not be readable."""
    for path in PATHS:
        (folder / path).write_bytes(b"x")
    (folder / name).write_text(text, encoding="utf-8")
    return open_dataset(folder / name)


def test_one_hot_columns_are_labels(tmp_path: Path) -> None:
    text = "filename,red,grün\n" + "".join(f"{p},{int(c == 'red')},{int(c != 'red')}\n" for p, c in ROWS)
    source = listed(tmp_path, "x.csv", text)
    assert source.classes == ("grün", "red")
    assert source.labels.tolist() == [1, 1, 1, 0, 0, 0]
    several = listed(tmp_path, "x.csv", text.replace("0.png,1,0", "0.png,1,1"))
    assert several.multi_label
    assert several.labels[0].tolist() == [True, True]


@pytest.mark.parametrize(
    ("names", "rows", "classes", "left"),
    [
        ("cat,dog,verified", ("1,0,1", "0,1,0", "1,0,0"), ["cat", "dog"], "'verified'"),
        ("cat,dog,is_difficult", ("1,0,0", "0,1,0", "1,0,0"), ["cat", "dog"], "'is_difficult'"),
        ("cat,indoor,dog", ("1,0,0", "0,1,1", "1,1,0"), ["cat", "dog"], "'indoor'"),
        ("dark,cat,dog,blurred", ("0,1,0,0", "1,0,1,0", "1,1,0,1"), ["cat", "dog"], "'dark', 'blurred'"),
        ("verified,unverified", ("1,0", "0,1", "1,0"), ["unverified", "verified"], ""),
    ],
)
def test_only_columns_of_one_1_a_row_are_classes(
    names: str, rows: tuple[str, ...], classes: list[str], left: str, tmp_path: Path
) -> None:
    text = f"filename,{names}\n" + "".join(f"{path},{row}\n" for (path, _), row in zip(ROWS, rows, strict=False))
    source = listed(tmp_path, "x.csv", text)
    assert (source.multi_label, sorted(source.classes)) == (False, classes)
    told = next(line for line in describe(source) if line.startswith("columns: "))
    warned = any("taken for no class" in line for line in describe(source))
    assert warned == (left in ("'indoor'", "'dark', 'blurred'"))
    assert told.endswith(f"; not read: {left}" if left else "are classes of 0 and 1")


def test_columns_of_0_and_1_that_no_row_has_and_those_called_as_splits_are_not_passed_over(tmp_path: Path) -> None:
    text = "filename,cat,dog,cow\n" + "".join(f"{p},{int(c == 'red')},{int(c != 'red')},0\n" for p, c in ROWS)
    source = listed(tmp_path, "x.csv", text)
    assert source.classes == ("cat", "dog")
    assert "warning: left out, because no row has a 1 there: 'cow'" in describe(source)
    for name, meant in (("valid", "is_valid"), ("test", "is_test")):
        rows = text.replace("cow", name).replace("0.png,1,0,0", "0.png,1,0,1")
        with pytest.raises(InputError, match=f"does '{name}', of yes and no, tell .* Call it {meant} if so"):
            listed(tmp_path, "x.csv", rows)


def write_columns(path: Path, columns: dict[str, list[Any]], rows: int = 4) -> Path:
    """A Parquet file of images with other columns than `label`."""
    pixels = [png(np.full((4, 4, 3), 9 * row, dtype=np.uint8)) for row in range(rows)]
    write_parquet(path, pixels, [0] * rows, **columns)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["label"]), path)
    return path


@pytest.mark.parametrize("kind", [int, bool])
def test_one_hot_columns_of_parquet_are_labels(kind: type, tmp_path: Path) -> None:
    columns = {name: list(map(kind, cells)) for name, cells in {"cat": [1, 0, 0, 1], "dog": [0, 1, 1, 0]}.items()}
    columns["reviewed"] = [kind(1)] * 3 + [kind(0)]
    source = open_dataset(write_columns(tmp_path / "a.parquet", columns))
    assert (source.multi_label, source.classes, source.labels.tolist()) == (False, ("cat", "dog"), [0, 1, 1, 0])
    assert "columns: 'img' is the image, 'cat', 'dog' are classes of 0 and 1; not read: 'reviewed'" in describe(source)
    assert not any(line.startswith("warning") for line in describe(source))
    shard = open_dataset((tmp_path / "a.parquet").as_uri())
    assert (shard.classes, shard.labels.tolist()) == (("cat", "dog"), [0, 1, 1, 0])


def test_one_hot_columns_of_several_ones_a_row_are_multi_label_in_parquet_too(tmp_path: Path) -> None:
    for name, cats in (("train", [1, 0, 0, 1]), ("test", [1, 1, 0, 1])):
        write_columns(tmp_path / f"{name}.parquet", {"cat": cats, "dog": [0, 1, 1, 0]})
    source = open_dataset(tmp_path)
    assert source.multi_label
    assert source.labels[:2].tolist() == [[True, False], [True, True]]
    with pytest.raises(InputError, match="several labels an image are read from local Parquet files only"):
        open_dataset((tmp_path / "test.parquet").as_uri())


@pytest.mark.parametrize("name", ["valid", "val", "Test"])
@pytest.mark.parametrize("kind", [int, bool])
def test_a_column_of_parquet_that_may_tell_splits_is_not_passed_over(name: str, kind: type, tmp_path: Path) -> None:
    flags = list(map(kind, (1, 0, 0, 0)))
    path = tmp_path / "a.parquet"
    write_parquet(
        path, [png(np.full((4, 4, 3), n, np.uint8)) for n in range(4)], [0, 1, 0, 1], ["a", "b"], **{name: flags}
    )
    with pytest.raises(InputError, match=f"does '{name}', of yes and no, tell the .* images"):
        open_dataset(path)


def test_what_was_taken_is_said_where_nothing_is_called_as_usual(tmp_path: Path) -> None:
    images = [png(np.full((4, 4, 3), n, np.uint8)) for n in range(4)]
    write_parquet(tmp_path / "x.parquet", images, [0, 1, 0, 1], ["a", "b"], "mask")
    assert "columns: 'mask' is the image, 'label' is the label" in describe(open_dataset(tmp_path / "x.parquet"))
    told = ["train", "test"] * 2
    write_parquet(tmp_path / "y.parquet", images, [0, 1, 1, 0], ["a", "b"], train_test=told, text=["x"] * 4)
    assert open_dataset(tmp_path / "y.parquet").splits == told


def test_columns_called_as_labels_or_without_a_one_are_no_classes(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "a.parquet", {"fine_label": [0, 1, 0, 1], "coarse_label": [0, 0, 1, 1]})
    with pytest.raises(InputError, match="which of 'fine_label', 'coarse_label' is the label"):
        open_dataset(path)
    path = write_columns(tmp_path / "b.parquet", {"cat": [0.0, 1.0, 0.0, 1.0], "dog": [1.0, 0.0, 1.0, 0.0]})
    assert open_dataset(path).classes == ("cat", "dog")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_of_minus_1_and_1_are_classes_and_those_of_0_beside_these_are_asked_about(
    kind: str, tmp_path: Path
) -> None:
    young, bald = [1, 1, -1, -1, 1, -1], [-1, 1, -1, 1, -1, -1]

    def opened(**columns: list[Any]) -> Dataset:
        if kind == "parquet":
            write_parquet(tmp_path / "x" / "0.parquet", [png(np.zeros((2, 2), np.uint8))] * 6, bald, None)
            table = pq.read_table(tmp_path / "x" / "0.parquet").drop_columns("label")
            for name, values in columns.items():
                table = table.append_column(name, [values])
            pq.write_table(table, tmp_path / "x" / "0.parquet")
            return open_dataset(tmp_path / "x")
        rows = zip(PATHS, *columns.values(), strict=True)
        lines = [",".join("" if cell is None else str(cell) for cell in row) for row in rows]
        return listed(tmp_path, "x.csv", "\n".join([",".join(("image_id", *columns)), *lines]))

    source = opened(Young=young, Bald=bald)
    order = [source.classes.index(name) for name in ("Young", "Bald")]
    assert source.multi_label
    assert source.labels[:, order].tolist() == [[y == 1, b == 1] for y, b in zip(young, bald, strict=True)]
    one = opened(cat=[1, 1, 1, -1, -1, -1], dog=[-1, -1, -1, 1, 1, 1])
    assert [one.label_text(index) for index in range(6)] == ["cat"] * 3 + ["dog"] * 3
    with pytest.raises(InputError, match="'Edema', 'Fracture' hold -1 beside 0, 1 or empty cells"):
        opened(Nothing=[1, 0, 0, 0, 1, 0], Edema=[-1, 0, 1, 1, 0, 0], Fracture=[1, None, -1, 0, 1, 1])


@pytest.mark.parametrize("trailing", ["", " "])
@pytest.mark.parametrize("count", ["6\n", ""])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_list_of_attributes_as_celeba_has_it_is_read(end: str, count: str, trailing: str, tmp_path: Path) -> None:
    rows = "".join(f"{path}  1 {'-1' if number % 2 else ' 1'}\n" for number, path in enumerate(PATHS))
    source = listed(tmp_path, "x.txt", f"{count}Young Bald{trailing}\n{rows}".replace("\n", end))
    assert source.names == PATHS
    assert source.classes == ("Bald", "Young")
    assert source.labels.tolist() == [[number % 2 == 0, True] for number in range(6)]


def test_a_table_of_rs_is_read_and_separators_behind_all_rows_shift_nothing(tmp_path: Path) -> None:
    rows = "".join(f'"{number}","{path}","{label}"\n' for number, (path, label) in enumerate(ROWS, start=1))
    source = listed(tmp_path, "x.csv", f'"path","label"\n{rows}')
    assert [source.label_text(index) for index in range(6)] == [label for _, label in ROWS]
    ended = "".join(f"{path},{label},\n" for path, label in ROWS)
    assert listed(tmp_path, "x.csv", f"path,label\n{ended}").labels.tolist() == source.labels.tolist()
