from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.open import open_dataset
from tokenfusion.errors import InputError


def parquet_of(folder: Path, labels: list[Any]) -> Dataset:
    pq.write_table(pa.table({"image": [b"x"] * len(labels), "label": labels}), folder / "x.parquet")
    return open_dataset(folder)


def csv_of(folder: Path, labels: list[str]) -> Dataset:
    rows = [f"{number}.png,{label}" for number, label in enumerate(labels)]
    (folder / "x.csv").write_text("\n".join(["path,label", *rows]))
    return open_dataset(folder / "x.csv")


@pytest.mark.parametrize("labels", [["0.0", "1.0", "-1.0"], ["cat", "dog", "-1"], ["0", "1", "-1"]])
def test_minus_one_is_no_class_however_it_is_written(labels: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"line 4: label {labels[2]} stands for no label; take"):
        csv_of(tmp_path, labels)
    with pytest.raises(InputError, match=rf"'x.parquet:2' has label {labels[2]}, which stands for no label"):
        parquet_of(tmp_path, labels)


@pytest.mark.parametrize("labels", [["1", "-1"], ["1.0", "-1.0"]])
def test_minus_one_and_one_are_two_classes(labels: list[str], tmp_path: Path) -> None:
    assert csv_of(tmp_path, labels).classes == ("-1", "1")
    assert parquet_of(tmp_path, labels).classes == ("-1", "1")


@pytest.mark.parametrize("labels", [["a", ""], ["a", " "], [["a"], [""]], [["a"], ["b", None]], [[1], [None]]])
def test_an_empty_label_in_parquet_is_refused(labels: list[Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'x.parquet:1' has an empty label; name its class"):
        parquet_of(tmp_path, labels)


def test_a_class_called_as_a_missing_value_is_warned_of(tmp_path: Path) -> None:
    source = csv_of(tmp_path, ["cat", "NaN", "dog"])
    assert "warning: 'NaN' is a class here, and may stand for a missing label" in source.notes
    assert not any("missing" in note for note in csv_of(tmp_path, ["cat", "banana"]).notes)


def test_vectors_of_0_and_1_are_no_lists_of_labels(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'x.parquet:0' has labels '0', '1', '0'; name each label once"):
        parquet_of(tmp_path, [[0, 1, 0], [1, 0, 0]])
    with pytest.raises(InputError, match="every image has all labels, '0', '1'; name those of each image"):
        parquet_of(tmp_path, [[0, 1], [1, 0]])
