import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.open import open_dataset
from tokenfusion.data.shard_index import index_parquet
from tokenfusion.errors import InputError
from tokenfusion.recipe import Reading

NAMES = ["a.png", "b.png", "c.png", "d.png"]
NANOSECONDS = pa.array([1700000000123456789] * 2 + [1700000000123456790] * 2, pa.timestamp("ns"))
NO_TEXT = pa.array([b"\xff\xfe"] * 4).view(pa.string())


def image_folder(folder: Path, table: pa.Table) -> Dataset:
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        (folder / name).touch()
    pq.write_table(table, folder / "metadata.parquet")
    return open_dataset(folder)


def embedded(folder: Path, **columns: Any) -> Dataset:
    folder.mkdir()
    pq.write_table(pa.table({"image": [b"x"] * 4, **columns}), folder / "x.parquet")
    return open_dataset(folder)


def test_other_columns_of_metadata_are_not_read(tmp_path: Path) -> None:
    columns = {"file_name": NAMES, "label": [*"xyxy"], "taken": NANOSECONDS, "remark": NO_TEXT}
    source = image_folder(tmp_path, pa.table(columns))
    assert source.classes == ("x", "y")
    assert any("not read: 'taken', 'remark'" in note for note in source.notes)


def test_a_column_that_is_read_and_holds_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metadata\.parquet: column 'label' cannot be read"):
        image_folder(tmp_path, pa.table({"file_name": NAMES, "label": NO_TEXT}))


def test_times_are_groups(tmp_path: Path) -> None:
    for source in (
        embedded(tmp_path / "files", label=[*"xyxy"], group=NANOSECONDS),
        image_folder(tmp_path / "folder", pa.table({"file_name": NAMES, "label": [*"xyxy"], "group": NANOSECONDS})),
    ):
        assert source.groups is not None
        assert source.groups.tolist() == [0, 0, 1, 1]


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    labels, twice = pa.array([*"xyxy"]), r"several columns are called 'label'; give each its own name$"
    table = pa.table([pa.array(NAMES), labels, labels], names=["file_name", "label", "label"])
    with pytest.raises(InputError, match=twice):
        image_folder(tmp_path, table)
    pq.write_table(table.set_column(0, "image", pa.array([b"x"] * 4)), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=twice):
        open_dataset(tmp_path / "x.parquet")


def class_labels(column: str, values: list[Any], names: list[str]) -> pa.Table:
    features = {column: {"_type": "ClassLabel", "names": names}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table({"file_name": NAMES, column: values}).replace_schema_metadata(metadata)


def test_class_labels_of_metadata_have_their_names(tmp_path: Path) -> None:
    source = image_folder(tmp_path, class_labels("label", [1, 0, 1, 0], ["red", "blue"]))
    assert [source.classes[label] for label in source.labels] == ["blue", "red", "blue", "red"]
    with pytest.raises(InputError, match=r"row 2: label -1, none of the 2 class names; add its name"):
        image_folder(tmp_path, class_labels("label", [1, 0, -1, 0], ["red", "blue"]))


def test_a_column_of_any_name_is_read_where_an_option_names_it(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).touch()
    pq.write_table(pa.table({"file_name": NAMES, "colour": [*"xyxy"]}), tmp_path / "metadata.parquet")
    assert open_dataset(tmp_path, reading=Reading(label_column="colour")).classes == ("x", "y")


def test_a_shard_whose_labels_are_no_text_is_refused() -> None:
    shard = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x"] * 4, "label": NO_TEXT}), shard)
    with pytest.raises(InputError, match=r"x\.parquet: not readable as Parquet \('utf-8' codec"):
        index_parquet("x.parquet", io.BytesIO(shard.getvalue()), Reading())
