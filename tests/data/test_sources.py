import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tokenfusion.data import parquet, trees
from tokenfusion.data.decode import UnreadableImage
from tokenfusion.data.sources import held_out_name, open_source
from tokenfusion.errors import InputError

Tree = dict[str, np.ndarray]
SaveTree = Callable[[Path, Tree], Path]
LIMIT = 10_000


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(source: Any, index: int) -> np.ndarray:
    return source.decode(index, LIMIT).permute(1, 2, 0).numpy()


def write_parquet(
    path: Path,
    files: list[bytes | None],
    labels: list[Any],
    names: list[str] | None = None,
    image: str = "img",
    **columns: Any,
) -> None:
    """A file as the Hugging Face library writes it, two images per row group; without its metadata if names is None."""
    images = pa.array(
        [{"bytes": data, "path": None} for data in files], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table = pa.table({image: images, "label": labels, **columns})
    if names is not None:
        features = {image: {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


def write_tar(path: Path, tree: Tree, top: str = "") -> Path:
    with tarfile.open(path, "w:" + {".tgz": "gz", ".gz": "gz", ".xz": "xz"}.get(path.suffix, "")) as tar:
        for name, pixels in tree.items():
            add(tar, top + name, png(pixels))
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_kind(kind: str, folder: Path, pets: Tree, save_tree: SaveTree) -> Path:
    """The same eleven pictures as every kind of data."""
    labels = [name.split("/")[0] for name in pets]
    if kind == "folder":
        return save_tree(folder / "data", pets)
    if kind.startswith("parquet"):
        values, names = (
            (labels, None) if kind == "parquet of strings" else ([int(x == "dog") for x in labels], ["cat", "dog"])
        )
        write_parquet(folder / "data" / "pictures.parquet", [png(pixels) for pixels in pets.values()], values, names)
        return folder / "data"
    if kind == "csv":
        save_tree(folder, pets)
        rows = "".join(f"{name},{label}\n" for name, label in zip(pets, labels, strict=True))
        (folder / "list.csv").write_text("path,label\n" + rows, encoding="utf-8-sig")
        return folder / "list.csv"
    if kind == "jsonl":
        save_tree(folder, pets)
        rows = "".join(json.dumps({"path": n, "label": x}) + "\n" for n, x in zip(pets, labels, strict=True))
        (folder / "list.jsonl").write_text(rows)
        return folder / "list.jsonl"
    return write_tar(folder / kind, pets, "./" if kind == "a.tar" else "pets-1.0/")


KINDS = ["folder", "parquet", "parquet of strings", "csv", "jsonl", "a.tar", "b.tar", "c.tar.gz", "d.tgz", "e.tar.xz"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_images(kind: str, tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    source = open_source(write_kind(kind, tmp_path, pets, save_tree))
    assert source.classes == ("cat", "dog")
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0] * 5 + [1] * 6
    assert source.splits == [""] * 11
    assert held_out_name(source) is None
    again = pickle.loads(pickle.dumps(source))  # as a loader's process may get it
    for index, (name, pixels) in enumerate(pets.items()):
        assert source.names[index] == (f"pictures.parquet:{index}" if "parquet" in kind else name)
        assert np.array_equal(pixels_of(source, index), pixels)
        assert np.array_equal(pixels_of(again, index), pixels)


@pytest.mark.parametrize("kind", ["folder", "parquet", "csv", "a.tar", "c.tar.gz"])
def test_max_pixels_reaches_every_kind(kind: str, tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    source = open_source(write_kind(kind, tmp_path, pets, save_tree))
    with pytest.raises(UnreadableImage, match="max_pixels=44"):
        source.decode(0, 44)  # 5 × 9


def test_digits_are_scikit_learns_scaled_to_bytes() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    source = open_source("digits")
    assert len(source) == 1797
    assert source.classes == tuple("0123456789")
    assert source.labels.tolist() == digits.target.tolist()
    assert source.names[17] == "digits:17"
    assert held_out_name(source) is None
    pixels = pixels_of(source, 17)
    assert pixels.shape == (8, 8, 3)
    for value, byte in ((0, 0), (16, 255), (8, 128), (5, 80)):
        assert (pixels[digits.images[17] == value] == byte).all()
    assert {0, 5, 8, 16} <= set(digits.images[17].ravel())
    with pytest.raises(UnreadableImage, match="max_pixels=63"):
        source.decode(0, 63)


# ---- folders


@pytest.mark.parametrize(
    ("folder", "split"), [("val", "val"), ("valid", "val"), ("validation", "val"), ("test", "test"), ("Test", "test")]
)
def test_split_folders(folder: str, split: str, tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(tmp_path / "train", pets)
    save_tree(tmp_path / folder, {"dog/x.png": pets["dog/1.png"]})
    source = open_source(tmp_path)
    assert source.classes == ("cat", "dog")
    assert sorted(source.splits) == sorted(["train"] * 11 + [split])
    assert source.names[source.splits.index(split)] == f"{folder}/dog/x.png"
    assert held_out_name(source) == split


def test_validation_is_preferred_to_test(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    for folder in ("train", "val", "test"):
        save_tree(tmp_path / folder, pets)
    assert held_out_name(open_source(tmp_path)) == "val"


def test_a_class_may_be_called_train(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(tmp_path, {"train/1.png": pets["cat/1.png"], "plane/1.png": pets["cat/2.png"]})
    source = open_source(tmp_path)
    assert source.classes == ("plane", "train")
    assert source.splits == ["", ""]


def test_files_that_are_no_images_are_ignored_and_counted(pets_folder: Path) -> None:
    for name in ("cat/notes.txt", "cat/.DS_Store", "dog/._1.png", "README.md", "stray.png"):
        (pets_folder / name).write_bytes(b"x")
    source = open_source(pets_folder)
    assert len(source) == 11
    assert source.ignored == 5


def test_images_below_a_class_folder_belong_to_the_class(pets_folder: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(pets_folder, {"cat/outdoor/night/7.png": pets["dog/1.png"]})
    source = open_source(pets_folder)
    assert source.labels[source.names.index("cat/outdoor/night/7.png")] == 0


def test_folders_that_link_to_themselves_end(pets_folder: Path) -> None:
    (pets_folder / "cat" / "again").symlink_to(pets_folder / "cat")
    (pets_folder / "dog" / "all").symlink_to(pets_folder)
    (pets_folder / "loop").symlink_to(pets_folder)
    (pets_folder / "dog" / "up").symlink_to("../..")
    source = open_source(pets_folder)
    assert source.classes == ("cat", "dog")
    assert len(source) == 11


def test_folders_that_link_to_each_other_end(pets_folder: Path) -> None:
    (pets_folder / "cat" / "friends").symlink_to(pets_folder / "dog")
    (pets_folder / "dog" / "friends").symlink_to(pets_folder / "cat")
    assert len(open_source(pets_folder)) == 22


def test_linked_class_folders_and_images_are_read(tmp_path: Path, pets_folder: Path, pets: Tree) -> None:
    (tmp_path / "links" / "bird").mkdir(parents=True)
    (tmp_path / "links" / "cat").symlink_to(pets_folder / "cat")
    (tmp_path / "links" / "bird" / "1.png").symlink_to(pets_folder / "dog" / "1.png")
    source = open_source(tmp_path / "links")
    assert source.names[0] == "bird/1.png"
    assert np.array_equal(pixels_of(source, 0), pets["dog/1.png"])
    assert len(source) == 6


ODD = ["a b.png", "new\nline.png", 'tab\tand,comma".png', "größe-猫.png", "UPPER.PNG", os.fsdecode(b"latin-\xe9.png")]


@pytest.mark.parametrize("name", ODD)
def test_any_file_name_works(name: str, pets_folder: Path, pets: Tree) -> None:
    Image.fromarray(pets["dog/3.png"]).save(pets_folder / "cat" / name)
    source = open_source(pets_folder)
    (index,) = [i for i, known in enumerate(source.names) if known not in pets]
    assert np.array_equal(pixels_of(source, index), pets["dog/3.png"])
    assert source.names[index].encode() == os.fsencode(f"cat/{name}").replace(b"\xe9.", b"\\udce9.")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "damaged"),
        (lambda path: path.write_bytes(b""), "0 bytes"),
        (lambda path: path.write_text("hello"), "not an image"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda path: (path.unlink(), path.symlink_to(path)), "symbolic links"),
        (lambda path: os.truncate(path, 2**30 + 1), "bytes, more than"),
    ],
)
def test_an_image_that_cannot_be_read_is_an_error_of_its_own(damage: Any, reason: str, pets_folder: Path) -> None:
    source = open_source(pets_folder)
    damage(pets_folder / "cat" / "2.png")
    with pytest.raises(UnreadableImage, match=reason):
        source.decode(2, LIMIT)
    assert len(open_source(pets_folder)) in (10, 11)


def test_a_link_to_itself_is_listed_and_found_unreadable(pets_folder: Path) -> None:
    (pets_folder / "cat" / "x.png").symlink_to("x.png")
    source = open_source(pets_folder)
    with pytest.raises(UnreadableImage, match="symbolic links"):
        source.decode(source.names.index("cat/x.png"), LIMIT)


# ---- refusals that hold for all kinds


def test_no_such_path_names_what_is_there(pets_folder: Path) -> None:
    with pytest.raises(InputError, match=r"pest: no such file or folder; .* has: 'pets'"):
        open_source(pets_folder.parent / "pest")
    with pytest.raises(InputError, match=r"has: 'cat', 'dog'"):
        open_source(pets_folder / "missing" / "deeper")
    with pytest.raises(InputError, match="no such file"):
        open_source("\0")
    with pytest.raises(InputError, match="no such file"):
        open_source("x" * 5000)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no image found .*subfolder per class"):
        open_source(tmp_path)


def test_a_folder_without_class_folders(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    with pytest.raises(InputError, match=r"no image found \(1 other files\)"):
        open_source(save_tree(tmp_path, {"1.png": pets["cat/1.png"]}))


def test_a_single_class(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    with pytest.raises(InputError, match=r"a single class, 'cat'; .* two"):
        open_source(save_tree(tmp_path, {"cat/1.png": pets["cat/1.png"]}))


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_held_out_label_that_train_lacks(split: str, tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(tmp_path / "train", pets)
    save_tree(tmp_path / split, {"bird/1.png": pets["dog/1.png"], "fish/1.png": pets["dog/1.png"]})
    with pytest.raises(InputError, match=f"{split} has labels that train lacks: 'bird', 'fish'; add"):
        open_source(tmp_path)


def test_a_kind_that_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"data.zip: not a kind of data"):
        open_source(tmp_path / "data.zip")


# ---- Parquet


def test_parquet_files_tell_their_split(tmp_path: Path, pets: Tree) -> None:
    files = [png(pixels) for pixels in pets.values()]
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(
            tmp_path / "data" / f"{name}.parquet", files, [1, 0, 1] + [0] * 8, ["zebra", "ant"], image="picture"
        )
    (tmp_path / "README.md").write_text("x")
    source = open_source(tmp_path)
    assert source.classes == ("zebra", "ant")  # in the metadata's order
    assert source.splits == ["test"] * 11 + ["train"] * 22
    assert source.labels[:4].tolist() == [1, 0, 1, 0]
    assert source.names[14] == "data/train-00000-of-00002.parquet:3"
    assert source.ignored == 1
    for index in (32, 0, 13, 14, 31):
        assert np.array_equal(pixels_of(source, index), list(pets.values())[index % 11])


def test_one_parquet_file(tmp_path: Path, pets: Tree) -> None:
    write_parquet(tmp_path / "train.parquet", [png(pets["cat/1.png"])] * 2, [0, 1], ["a", "b"])
    assert open_source(tmp_path / "train.parquet").splits == ["train", "train"]


@pytest.mark.parametrize(
    ("name", "split"), [("val/0.parquet", "val"), ("validation-x.parquet", "val"), ("trainer.parquet", "")]
)
def test_split_of_a_parquet_name(name: str, split: str) -> None:
    assert parquet.split_of(name) == split


def test_parquet_memory_is_bounded(
    tmp_path: Path, picture: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [png(picture(number, 20, 20)) for number in range(10)]
    write_parquet(tmp_path / "train.parquet", files, [0, 1] * 5, ["a", "b"])
    monkeypatch.setattr(parquet, "CACHE_BYTES", 3 * len(files[0]))  # one row group, of two images, fits
    source = open_source(tmp_path)
    for index in (0, 9, 1, 5, 4, 8):
        assert np.array_equal(pixels_of(source, index), picture(index, 20, 20))
        assert len(source.cache.groups) == 1  # type: ignore[attr-defined]


def test_parquet_integer_labels_without_names(tmp_path: Path, pets: Tree) -> None:
    write_parquet(tmp_path / "train.parquet", [png(pets["cat/1.png"])] * 4, [10, 9, 10, 9])
    source = open_source(tmp_path)
    assert source.classes == ("9", "10")
    assert source.labels.tolist() == [1, 0, 1, 0]


def test_parquet_rows_without_bytes_or_with_bad_ones(tmp_path: Path, pets: Tree) -> None:
    write_parquet(tmp_path / "train.parquet", [None, b"", b"text", png(pets["cat/1.png"])], [0, 1, 0, 1], ["a", "b"])
    source = open_source(tmp_path)
    for index, reason in enumerate(["holds no bytes", "0 bytes", "not an image"]):
        with pytest.raises(UnreadableImage, match=reason):
            source.decode(index, LIMIT)
    assert np.array_equal(pixels_of(source, 3), pets["cat/1.png"])


def test_parquet_that_vanishes(tmp_path: Path, pets: Tree) -> None:
    write_parquet(tmp_path / "train.parquet", [png(pets["cat/1.png"])] * 2, [0, 1], ["a", "b"])
    source = open_source(tmp_path)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(UnreadableImage, match="row group cannot be read"):
        source.decode(0, LIMIT)


@pytest.mark.parametrize(
    ("labels", "names", "reason"),
    [
        ([0, None], ["a", "b"], r"'train.parquet:1' has no label"),
        ([0, -1], ["a", "b"], r"'train.parquet:1' has label -1, but the metadata has 2 class names"),
        ([0, 2], ["a", "b"], r"label 2"),
        (["x", "y"], ["a", "b"], "string, but its metadata names integer"),
    ],
)
def test_parquet_labels_that_mean_nothing(labels: list[Any], names: list[str], reason: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [b"", b""], labels, names)
    with pytest.raises(InputError, match=reason):
        open_source(tmp_path)


def test_parquet_files_that_disagree(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [b""], [0], ["a", "b"])
    write_parquet(tmp_path / "test.parquet", [b""], [0], ["b", "a"])
    with pytest.raises(InputError, match=r"'test.parquet' and 'train.parquet' differ"):
        open_source(tmp_path)


def test_parquet_of_which_only_some_name_a_split(tmp_path: Path) -> None:
    for name in ("train", "more"):
        write_parquet(tmp_path / f"{name}.parquet", [b"", b""], [0, 1], ["a", "b"])
    with pytest.raises(InputError, match=r"'more.parquet:0' is in no split"):
        open_source(tmp_path)


def test_parquet_without_images_labels_or_format(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["x"], "label": [0]}), path)
    with pytest.raises(InputError, match="'text', 'label' hold no images"):
        open_source(path)
    pq.write_table(pa.table({"image": [b"x"], "fine": [0], "coarse": [0]}), path)
    with pytest.raises(InputError, match="which of 'fine', 'coarse' is the label"):
        open_source(path)
    path.write_bytes(b"PAR1 and then nonsense")
    with pytest.raises(InputError, match="not readable as Parquet"):
        open_source(path)


def test_cifar10_as_it_is(shared_data: Path) -> None:
    source = open_source(shared_data / "cifar10")
    assert source.classes[:3] == ("airplane", "automobile", "bird")
    assert (source.splits.count("train"), source.splits.count("test")) == (50_000, 10_000)
    assert source.decode(59_999, LIMIT).shape == (3, 32, 32)


def test_imagenette_tar_as_it_is(shared_data: Path) -> None:
    source = open_source(shared_data / "imagenette-224.tar")
    assert len(source.classes) == 10
    assert (source.splits.count("train"), source.splits.count("val")) == (4000, 1000)
    assert source.names[0].startswith("train/n01440764/")
    assert source.decode(4999, 10**6).shape == (3, 224, 224)


# ---- CSV and JSONL


def test_csv_splits_and_odd_names(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(tmp_path, {"a b/new\nline,1.png": pets["cat/1.png"], "c.png": pets["dog/1.png"]})
    (tmp_path / "x.csv").write_text('path,label,split\n"a b/new\nline,1.png",Ä,train\nc.png,b,Train\n./c.png,b,valid\n')
    source = open_source(tmp_path / "x.csv")
    assert source.classes == ("b", "Ä")
    assert source.splits == ["train", "train", "val"]
    assert source.names == ["a b/new\nline,1.png", "c.png", "c.png"]
    assert np.array_equal(pixels_of(source, 0), pets["cat/1.png"])


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.png", "a/../../x.png", ".."])
def test_a_list_may_not_leave_its_folder(path: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"path,label\nok.png,a\n{path},b\n")
    with pytest.raises(InputError, match=r"line 3: path='.*' leaves the list's folder"):
        open_source(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,label\nx.png,a\n", r"first line is \['file', 'label'\]; it must name columns path,label"),
        ("", "must name columns"),
        ("path,label\n", "no image found"),
        ("path,label\nx.png,\n", "line 2: label=''"),
        ("path,label\nx.png\n", "line 2: label=None"),
        ("path,label,split\nx.png,a,dev\n", "line 2: split='dev' is not known; choose train"),
        ("path,label,split\nx.png,a,train\ny.png,b,\n", "'y.png' is in no split while others are"),
        ('path,label\n"x.png,a\n', "cannot be read"),
    ],
)
def test_csv_that_cannot_be_used(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=reason):
        open_source(tmp_path / "x.csv")


def test_csv_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"path,label\n\xe9.png,a\n")
    with pytest.raises(InputError, match="UTF-8"):
        open_source(tmp_path / "x.csv")


def test_jsonl_labels_may_be_numbers_and_names_anything(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(tmp_path, {"new\nline.png": pets["cat/1.png"]})
    rows = [
        {"path": "new\nline.png", "label": 3},
        {"path": "nul\0.png", "label": 10},
        {"path": "\ud800.png", "label": 3},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    source = open_source(tmp_path / "x.jsonl")
    assert source.classes == ("10", "3")
    assert np.array_equal(pixels_of(source, 0), pets["cat/1.png"])
    for index in (1, 2):
        source.names[index].encode()
        with pytest.raises(UnreadableImage, match="cannot be read"):
            source.decode(index, LIMIT)


@pytest.mark.parametrize(
    ("line", "reason"),
    [("nonsense", "not JSON"), ("[1]", "is not like"), ('{"path": "x.png"}', "label=None"), ("[" * 9999, "not JSON")],
)
def test_jsonl_that_cannot_be_used(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"path": "a.png", "label": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match=f"line 2: .*{reason}"):
        open_source(tmp_path / "x.jsonl")


# ---- tar


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_tar_with_splits_links_and_other_files(name: str, tmp_path: Path, pets: Tree) -> None:
    with tarfile.open(tmp_path / name, "w:" + ("gz" if name.endswith("gz") else "")) as tar:
        for part in ("train", "val"):
            for file, pixels in pets.items():
                add(tar, f"top/{part}/{file}", png(pixels))
        add(tar, "top/train/cat/notes.txt", b"x")
        for kind, link in ((tarfile.LNKTYPE, "hard.png"), (tarfile.SYMTYPE, "soft.png")):
            member = tarfile.TarInfo(f"top/train/cat/{link}")
            member.type, member.linkname = kind, "top/train/dog/3.png"
            tar.addfile(member)
    source = open_source(tmp_path / name)
    assert source.splits == ["train"] * 12 + ["val"] * 11
    assert source.ignored == 2
    assert np.array_equal(pixels_of(source, source.names.index("train/cat/hard.png")), pets["dog/3.png"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]  # nothing was unpacked


def test_tar_members_never_reach_outside(tmp_path: Path, pets: Tree) -> None:
    tree = {**pets, "../../escape/1.png": pets["cat/1.png"]}
    source = open_source(write_tar(tmp_path / "x.tar", tree))
    assert len(source) == 11
    assert source.ignored == 1


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tar.xz"])
@pytest.mark.parametrize("share", [0.3, 0.5])  # 6,144 and 10,240 bytes of the plain one are whole members
def test_a_truncated_tar_is_refused(name: str, share: float, tmp_path: Path, pets: Tree) -> None:
    path = write_tar(tmp_path / name, pets)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(InputError, match=r"damaged"):
        open_source(path)


def test_a_tar_damaged_in_the_middle_is_refused(tmp_path: Path, pets: Tree) -> None:
    path = write_tar(tmp_path / "x.tar", pets)
    data = bytearray(path.read_bytes())
    header = data.index(b"dog/2.png")
    data[header : header + 50] = b"\xff" * 50
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"damaged at byte {header}"):
        open_source(path)


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"nonsense" * 1000)
    with pytest.raises(InputError, match="not a tar"):
        open_source(tmp_path / "x.tar")


def test_a_tar_that_shrinks_or_vanishes(tmp_path: Path, pets: Tree) -> None:
    path = write_tar(tmp_path / "x.tar", pets)
    source = open_source(path)
    os.truncate(path, 600)
    with pytest.raises(UnreadableImage, match="the tar ends inside it, after 88 of"):
        source.decode(0, LIMIT)
    path.unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        source.decode(0, LIMIT)


def test_a_compressed_tar_beyond_the_memory_limit(tmp_path: Path, pets: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar.gz", pets)
    monkeypatch.setattr(trees, "MEMORY_LIMIT", 500)
    with pytest.raises(InputError, match=r"x.tar.gz: .*GiB.* plain .tar"):
        open_source(path)
