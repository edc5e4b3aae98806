import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import LIMIT, pixels_of, png, write_parquet

from tokenfusion.data import parquet
from tokenfusion.data.decode import UnreadableImage
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split_names import split_in_name
from tokenfusion.errors import InputError
from tokenfusion.recipe import Reading

Tree = dict[str, np.ndarray]
SaveTree = Callable[[Path, Tree], Path]


def test_parquet_files_tell_their_split(tmp_path: Path, pets: Tree) -> None:
    files = [png(pixels) for pixels in pets.values()]
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(
            tmp_path / "data" / f"{name}.parquet", files, [1, 0, 1] + [0] * 8, ["zebra", "ant"], image="picture"
        )
    (tmp_path / "README.md").write_text("x")
    source = open_dataset(tmp_path)
    assert source.classes == ("zebra", "ant")  # in the metadata's order
    assert source.splits == ["test"] * 11 + ["train"] * 22
    assert source.labels[:4].tolist() == [1, 0, 1, 0]
    assert source.names[14] == "data/train-00000-of-00002.parquet:3"
    assert source.ignored == 1
    for index in (32, 0, 13, 14, 31):
        assert np.array_equal(pixels_of(source, index), list(pets.values())[index % 11])


def test_one_parquet_file(tmp_path: Path, pets: Tree) -> None:
    write_parquet(tmp_path / "train.parquet", [png(pets["cat/1.png"])] * 2, [0, 1], ["a", "b"])
    assert open_dataset(tmp_path / "train.parquet").splits == ["train", "train"]


@pytest.mark.parametrize("column", ["subset", "set", "fold", "is_valid"])
def test_columns_of_splits_are_read_as_those_of_lists(column: str, tmp_path: Path, pets: Tree) -> None:
    told = [False, True, None, True] if column == "is_valid" else ["train", "val", "Training", "dev"]
    write_parquet(tmp_path / "1.parquet", [png(pets["cat/1.png"])] * 4, [0, 0, 1, 1], ["a", "b"], **{column: told})
    assert open_dataset(tmp_path / "1.parquet").splits == ["train", "val"] * 2


def test_two_flags_are_refused_and_a_set_that_names_no_split_is_left(tmp_path: Path, pets: Tree) -> None:
    images = [png(pets["cat/1.png"])] * 2
    flags = {"is_valid": [True, False], "is_test": [False, True]}
    write_parquet(tmp_path / "1.parquet", images, [0, 1], ["a", "b"], **flags)
    with pytest.raises(InputError, match="'is_valid', 'is_test' all tell splits"):
        open_dataset(tmp_path / "1.parquet")
    write_parquet(tmp_path / "2.parquet", images, [0, 1], ["a", "b"], set=["train", "crayons"])
    source = open_dataset(tmp_path / "2.parquet")
    assert source.splits == ["", ""]
    assert "not read: 'set'" in source.notes[0]


@pytest.mark.parametrize("names", [("trainset", "testset"), ("trainset/0", "testset/0"), ("train2017", "test2017")])
def test_parquet_files_of_joined_names_are_splits(names: tuple[str, str], tmp_path: Path, pets: Tree) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / f"{name}.parquet", [png(pets["cat/1.png"])] * 2, [0, 1], ["a", "b"])
    assert sorted(open_dataset(tmp_path).splits) == ["test", "test", "train", "train"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[("val/0.parquet", "val"), ("validation-x.parquet", "val"), ("trainer.parquet", "")],
        *[("trainset.parquet", "train"), ("val2017.parquet", "val"), ("testset/0.tar", "test")],
        *[("hold-out.parquet", "val"), ("seg_test.parquet", "test"), ("Hold-Out/metadata.csv", "val")],
    ],
)
def test_split_of_a_parquet_name(name: str, split: str) -> None:
    assert split_in_name(name) == split


def test_parquet_memory_is_bounded(
    tmp_path: Path, picture: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [png(picture(number, 20, 20)) for number in range(10)]
    write_parquet(tmp_path / "train.parquet", files, [0, 1] * 5, ["a", "b"])
    monkeypatch.setattr(parquet, "CACHE_BYTES", 3 * len(files[0]))  # one row group, of two images, fits
    source = open_dataset(tmp_path)
    for index in (0, 9, 1, 5, 4, 8):
        assert np.array_equal(pixels_of(source, index), picture(index, 20, 20))
        assert isinstance(source.reader, parquet.ParquetRows)
        assert len(source.reader.held) <= 2


@pytest.fixture
def many(tmp_path: Path, picture: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty images in twenty row groups, of which memory holds two; the cache lies in a folder of its own."""
    files = [png(picture(number)) for number in range(40)]
    write_parquet(tmp_path / "data" / "train.parquet", [*files[:39], None], [0, 1] * 20, ["a", "b"])
    monkeypatch.setattr(parquet, "CACHE_BYTES", 0)
    monkeypatch.setenv("TOKENFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which row groups were read, one after another."""
    groups: list[int] = []
    read = parquet.read_row_group
    monkeypatch.setattr(
        parquet, "read_row_group", lambda path, group, column: groups.append(group) or read(path, group, column)
    )
    return groups


def test_images_in_any_order_do_not_read_a_row_group_each(
    many: Path, reads: list[int], picture: Callable[..., np.ndarray]
) -> None:
    source = open_dataset(many / "data")
    for index in range(39):
        source.read(index)
    assert reads == list(range(20))  # in order: once each, and nothing is unpacked
    assert not (many / "cache").exists()
    order = np.random.default_rng(0).permutation(39).tolist() * 5
    for index in order:
        assert np.array_equal(pixels_of(source, index), picture(index))
    assert len(reads) <= (parquet.PASSES + 1) * 20
    with pytest.raises(UnreadableImage, match="the row holds no bytes"):
        source.decode(39, LIMIT)
    again = pickle.loads(pickle.dumps(source))  # another process finds what this one has unpacked
    before = len(reads)
    for index in order:
        assert again.read(index) == source.read(index)
    assert len(reads) <= before + parquet.PASSES * 20


@pytest.mark.parametrize("gb", ["1e-9", "none"])
def test_where_nothing_can_be_unpacked_row_groups_are_read_on(
    gb: str, many: Path, monkeypatch: pytest.MonkeyPatch, picture: Callable[..., np.ndarray]
) -> None:
    monkeypatch.setenv("TOKENFUSION_CACHE_GB", gb)
    source = open_dataset(many / "data")
    for index in np.random.default_rng(0).permutation(39).tolist() * 2:
        assert np.array_equal(pixels_of(source, index), picture(index))
    assert not (many / "cache").exists()


@pytest.mark.parametrize(
    ("first", "second", "classes", "numbers"),
    [
        (pa.array(["b", "a"]).dictionary_encode(), pa.array(["c", "a"]), ("a", "b", "c"), [1, 0, 2, 0]),
        (pa.array([7, 5], pa.int32()), pa.array([5, 9], pa.int64()), ("5", "7", "9"), [1, 0, 0, 2]),
        (pa.array(["b", "a"], pa.large_string()), pa.array(["a", "b"]), ("a", "b"), [1, 0, 0, 1]),
    ],
)
def test_parquet_labels_of_like_types(
    first: Any, second: Any, classes: tuple[str, ...], numbers: list[int], tmp_path: Path
) -> None:
    for name, labels in (("x0", first), ("x1", second)):
        write_parquet(tmp_path / f"{name}.parquet", [b"", b""], labels)
    source = open_dataset(tmp_path)
    assert source.classes == classes
    assert source.labels.tolist() == numbers


def test_a_dictionary_is_the_label_though_it_is_not_called_so(tmp_path: Path) -> None:
    table = pa.table({"image": [b"", b""], "animal": pa.array(["b", "a"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "x.parquet")
    assert open_dataset(tmp_path).classes == ("a", "b")


@pytest.mark.parametrize("labels", [[[["a"]], [["b"]]], [{"a": 1}, {"a": 2}], [0.5, 1.5]])
def test_parquet_labels_of_types_that_name_no_class(labels: list[Any], tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [b"", b""], labels)
    with pytest.raises(InputError, match="which is no label; give integers or strings"):
        open_dataset(tmp_path)


def test_parquet_integers_in_one_file_and_strings_in_another(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x0.parquet", [b"", b""], [0, 1])
    write_parquet(tmp_path / "x1.parquet", [b"", b""], ["a", "b"])
    with pytest.raises(InputError, match=r"'x0.parquet' and 'x1.parquet' differ: labels are of type int64 and string"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("names", "reason"),
    [(3, "names=3 for 'label'; they must be a list"), (["a", "a"], "several classes are called 'a'")],
)
def test_parquet_metadata_that_names_no_classes(names: Any, reason: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [b"", b""], [0, 1], names)
    with pytest.raises(InputError, match=reason):
        open_dataset(tmp_path)


def test_parquet_integer_labels_without_names(tmp_path: Path, pets: Tree) -> None:
    write_parquet(tmp_path / "train.parquet", [png(pets["cat/1.png"])] * 4, [10, 9, 10, 9])
    source = open_dataset(tmp_path)
    assert source.classes == ("9", "10")
    assert source.labels.tolist() == [1, 0, 1, 0]


def test_parquet_rows_without_bytes_or_with_bad_ones(tmp_path: Path, pets: Tree) -> None:
    write_parquet(tmp_path / "train.parquet", [None, b"", b"text", png(pets["cat/1.png"])], [0, 1, 0, 1], ["a", "b"])
    source = open_dataset(tmp_path)
    for index, reason in enumerate(["holds no bytes", "0 bytes", "not an image"]):
        with pytest.raises(UnreadableImage, match=reason):
            source.decode(index, LIMIT)
    assert np.array_equal(pixels_of(source, 3), pets["cat/1.png"])


def test_parquet_that_vanishes(tmp_path: Path, pets: Tree) -> None:
    write_parquet(tmp_path / "train.parquet", [png(pets["cat/1.png"])] * 2, [0, 1], ["a", "b"])
    source = open_dataset(tmp_path)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(UnreadableImage, match="row group cannot be read"):
        source.decode(0, LIMIT)


@pytest.mark.parametrize(
    ("labels", "names", "reason"),
    [
        ([0, None], ["a", "b"], r"train.parquet:1 has no label"),
        (
            [0, -1],
            ["a", "b"],
            r"'train.parquet:1' has label -1, none of the 2 class names; add its name, or take unlabelled files away",
        ),
        ([0, 2], ["a", "b"], r"label 2"),
        (["x", "y"], ["a", "b"], "string, but its metadata names integer"),
    ],
)
def test_parquet_labels_that_mean_nothing(labels: list[Any], names: list[str], reason: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [b"", b""], labels, names)
    with pytest.raises(InputError, match=reason):
        open_dataset(tmp_path)


def test_parquet_files_that_disagree(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [b""], [0], ["a", "b"])
    write_parquet(tmp_path / "test.parquet", [b""], [0], ["a", "c"])
    with pytest.raises(InputError, match=r"'test.parquet' and 'train.parquet' differ: .* not both have 'b', 'c'"):
        open_dataset(tmp_path)


def test_parquet_of_which_only_some_name_a_split(tmp_path: Path) -> None:
    for name in ("train", "more"):
        write_parquet(tmp_path / f"{name}.parquet", [b"", b""], [0, 1], ["a", "b"])
    with pytest.raises(InputError, match=r"'more.parquet:0' is in no split"):
        open_dataset(tmp_path)


def test_parquet_without_images_labels_or_format(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["x"], "label": [0]}), path)
    with pytest.raises(InputError, match="'text', 'label' hold no images"):
        open_dataset(path)
    pq.write_table(pa.table({"image": [b"x"], "fine": [0], "coarse": [0]}), path)
    with pytest.raises(InputError, match="which of 'fine', 'coarse' is the label"):
        open_dataset(path)
    path.write_bytes(b"PAR1 and then nonsense")
    with pytest.raises(InputError, match="not readable as Parquet"):
        open_dataset(path)


def test_cifar10_as_it_is(shared_data: Path) -> None:
    source = open_dataset(shared_data / "cifar10")
    assert source.classes[:3] == ("airplane", "automobile", "bird")
    assert (source.splits.count("train"), source.splits.count("test")) == (50_000, 10_000)
    assert source.decode(59_999, LIMIT).shape == (3, 32, 32)


def images_of(*values: bytes | None) -> pa.Array:
    rows = [{"bytes": value, "path": None} for value in values]
    return pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def write(path: Path, names: list[str] | None = None, feature: Any = None, **columns: Any) -> Path:
    table = pa.table(columns)
    if names:
        label = feature or {"_type": "ClassLabel", "names": names}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {"label": label}}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize("first", ["mask", "hash", "thumb"])
def test_the_image_is_chosen_by_name_and_type(first: str, tmp_path: Path, pets: Tree) -> None:
    files = [png(pixels) for pixels in list(pets.values())[:2]]
    other = (
        pa.array([b"\1\2", b"\3\4"]) if first == "hash" else images_of(png(pets["dog/1.png"]), png(pets["dog/2.png"]))
    )
    path = write(tmp_path / "x.parquet", **{first: other, "image": images_of(*files), "label": ["a", "b"]})
    source = open_dataset(path)
    assert [source.read(index) for index in range(2)] == files
    assert any("'image' is the image" in note and f"not read: '{first}'" in note for note in source.notes)


def test_where_two_columns_may_be_the_image_one_is_asked_for(tmp_path: Path, pets: Tree) -> None:
    files = [png(pixels) for pixels in list(pets.values())[:2]]
    path = write(tmp_path / "x.parquet", left=images_of(*files), right=images_of(*files[::-1]), label=["a", "b"])
    with pytest.raises(InputError, match=r"which of 'left', 'right' is the image.* --image-column left"):
        open_dataset(path)
    assert open_dataset(path, reading=Reading(image_column="right")).read(0) == files[1]
    with pytest.raises(InputError, match="'label' is string, which holds no images"):
        open_dataset(path, reading=Reading(image_column="label"))


def test_split_weight_and_group_columns_are_honoured(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.parquet",
        image=images_of(b"1", b"2", b"3", b"4"),
        label=["a", "b", "a", "b"],
        split=["Training", "Training", "validation", "validation"],
        weight=[1.0, 2.0, 1.0, 1.0],
        group=["x", "x", "y", "z"],
    )
    source = open_dataset(path)
    assert source.splits == ["train", "train", "val", "val"]
    assert source.weights is not None
    assert source.weights.tolist() == [1, 2, 1, 1]
    assert source.groups is not None
    assert source.groups.tolist() == [0, 0, 1, 2]


def test_class_labels_in_two_orders_are_read_by_name(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", ["a", "b"], image=images_of(b"1", b"2"), label=[0, 1])
    write(tmp_path / "test.parquet", ["b", "a"], image=images_of(b"3", b"4"), label=[0, 1])
    source = open_dataset(tmp_path)
    names = {source.read(index): source.label_text(index) for index in range(4)}
    assert names == {b"1": "a", b"2": "b", b"3": "b", b"4": "a"}


def test_a_class_that_no_row_has_is_left_out(tmp_path: Path) -> None:
    source = open_dataset(write(tmp_path / "x.parquet", ["a", "none", "b"], image=images_of(b"1", b"2"), label=[0, 2]))
    assert source.classes == ("a", "b")
    assert source.labels.tolist() == [0, 1]
    assert any(note.startswith("warning: left out, because no image has it: class 'none'") for note in source.notes)


@pytest.mark.parametrize("labels", [[["a", "b"], ["b"]], [[0, 1], [1]]])
def test_lists_of_labels_are_multi_label(labels: list[Any], tmp_path: Path) -> None:
    feature = {"_type": "Sequence", "feature": {"_type": "ClassLabel", "names": ["a", "b"]}}
    names = ["a", "b"] if labels[0][0] == 0 else None
    source = open_dataset(write(tmp_path / "x.parquet", names, feature, image=images_of(b"1", b"2"), label=labels))
    assert source.multi_label
    assert source.classes == ("a", "b")
    assert source.labels.tolist() == [[True, True], [False, True]]


def test_images_that_are_paths_alone_are_refused_in_words(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", image=images_of(None, None), label=["a", "b"])
    with pytest.raises(InputError, match="holds paths instead of image files in all 2 rows; embed the files"):
        open_dataset(path)


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        (pa.struct({"bytes": pa.null(), "path": pa.string()}), {"path": "a.png"}, "holds paths instead of image files"),
        (pa.struct({"bytes": pa.binary(), "path": pa.string()}), {"path": "a.png"}, "holds paths instead of image"),
        (pa.binary(), None, "column 'image' is empty in all 70 rows"),
    ],
)
def test_a_column_without_any_image_file_is_refused(
    kind: pa.DataType, value: Any, reason: str, statistics: bool, tmp_path: Path
) -> None:
    table = pa.table({"image": pa.array([value] * 70, kind), "label": ["a", "b"] * 35})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=35, write_statistics=statistics)
    with pytest.raises(InputError, match=reason):
        open_dataset(tmp_path / "x.parquet")


def test_one_image_file_without_statistics_is_enough(tmp_path: Path) -> None:
    table = pa.table({"image": images_of(*[None] * 69, b"1"), "label": ["a", "b"] * 35})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=35, write_statistics=False)
    assert len(open_dataset(tmp_path / "x.parquet").names) == 70


def test_a_label_of_minus_one_is_no_class(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'x.parquet:2' has label -1, which stands for no label"):
        open_dataset(write(tmp_path / "x.parquet", image=images_of(b"1", b"2", b"3"), label=[0, 1, -1]))
    signs = open_dataset(write(tmp_path / "y" / "y.parquet", image=images_of(b"1", b"2"), label=[1, -1]))
    assert signs.classes == ("-1", "1")


def test_configurations_are_not_merged(tmp_path: Path) -> None:
    for config in ("large", "small"):
        write(tmp_path / config / "train-0.parquet", image=images_of(b"1", b"2"), label=["a", "b"])
    with pytest.raises(
        InputError, match=r"holds several data sets, in 'large' and 'small', each with 'train'; give one"
    ):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path / "small")) == 2


def test_configurations_that_names_of_files_tell_are_not_merged(tmp_path: Path) -> None:
    for name in ("en-train", "en-test-00000-of-00001", "fr-train", "fr-test"):
        write_parquet(tmp_path / f"{name}.parquet", [b"x", b"x"], [0, 1], ["a", "b"])
    with pytest.raises(InputError, match="files begin with 'en', 'fr', each with 'test', 'train'; move each into"):
        open_dataset(tmp_path)
    for name in ("fr-train", "fr-test"):
        (tmp_path / f"{name}.parquet").unlink()
    assert len(open_dataset(tmp_path)) == 4
