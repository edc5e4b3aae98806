import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from making import pixels_of, png, write_parquet, write_tar

from serving import write_shards
from tokenfusion.data.dataset import held_out_name
from tokenfusion.data.decode import UnreadableImage
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import choose_split
from tokenfusion.errors import InputError

Tree = dict[str, np.ndarray]
SaveTree = Callable[[Path, Tree], Path]


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
    source = open_dataset(write_kind(kind, tmp_path, pets, save_tree))
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
    source = open_dataset(write_kind(kind, tmp_path, pets, save_tree))
    with pytest.raises(UnreadableImage, match="max_pixels=44"):
        source.decode(0, 44)  # 5 × 9


def test_digits_are_scikit_learns_scaled_to_bytes() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    source = open_dataset("digits")
    assert len(source) == 1797
    assert source.classes == tuple("0123456789")
    assert source.labels.tolist() == digits.target.tolist()
    assert source.names[17] == "digits:17"
    assert held_out_name(source) is None
    every = np.stack([pixels_of(source, index) for index in range(len(source))])
    assert (every == np.round(digits.images * 255 / 16)[..., None]).all()
    pixels = every[17]
    assert pixels.shape == (8, 8, 3)
    for value, byte in ((0, 0), (16, 255), (8, 128), (5, 80)):
        assert (pixels[digits.images[17] == value] == byte).all()
    assert {0, 5, 8, 16} <= set(digits.images[17].ravel())
    with pytest.raises(UnreadableImage, match="max_pixels=63"):
        source.decode(0, 63)


@pytest.mark.parametrize("kind", ["folder", "parquet", "shards"])
def test_opening_a_folder_walks_it_once(
    kind: str, tmp_path: Path, pets: Tree, save_tree: SaveTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENFUSION_CACHE", str(tmp_path / "cache"))
    if kind == "shards":
        write_shards(tmp_path / "data" / "below", {"train-0.tar": 3, "val-0.tar": 2})
    else:
        write_kind(kind, tmp_path, pets, save_tree)
    folders = [path for path in (tmp_path / "data").rglob("*") if path.is_dir()]
    scanned: list[str] = []
    scan = os.scandir

    def note(folder: str) -> Iterator[os.DirEntry[str]]:
        scanned.append(str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", note)
    open_dataset(tmp_path / "data")
    assert sorted(scanned) == sorted(map(str, [tmp_path / "data", *folders]))


def test_no_such_path_names_what_is_there(pets_folder: Path) -> None:
    (pets_folder / ".ci").mkdir()
    (pets_folder / "Thumbs.db").touch()
    (pets_folder / "a list.csv").touch()
    with pytest.raises(InputError, match=r"pest: no such file or folder; did you mean .*/pets\?"):
        open_dataset(pets_folder.parent / "pest")
    with pytest.raises(InputError, match=r"has: 'cat', 'dog', 'a list.csv'$"):
        open_dataset(pets_folder / "missing" / "deeper")
    with pytest.raises(InputError, match="no such file"):
        open_dataset("\0")
    with pytest.raises(InputError, match="no such file"):
        open_dataset("x" * 5000)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no image found; give a folder with a subfolder per class"):
        open_dataset(tmp_path)


def test_a_folder_without_class_folders(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    alone = save_tree(tmp_path / "alone" / "photos", {"1.png": pets["cat/1.png"]})
    with pytest.raises(InputError, match=r"1 image directly in it, .* such as .*/cat/1\.png, or give a CSV that"):
        open_dataset(alone)
    parent = save_tree(tmp_path / "pets", {"cat/1.png": pets["cat/1.png"], "dog/1.png": pets["dog/1.png"]})
    with pytest.raises(InputError, match=r"1 image directly in it, .*/pets, of which it is a class, or a CSV that"):
        open_dataset(parent / "cat")
    (parent / "runs" / "first").mkdir(parents=True)  # what holds runs too holds no classes
    with pytest.raises(InputError, match=r"put the images of each class into a folder of its own, such as"):
        open_dataset(parent / "cat")


def test_a_single_class_cannot_be_trained_on(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    source = open_dataset(save_tree(tmp_path, {"cat/1.png": pets["cat/1.png"], "cat/2.png": pets["cat/2.png"]}))
    with pytest.raises(InputError, match=r"a single class, 'cat'; .* two"):
        choose_split(source, 0.2, seed=0)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_held_out_label_that_train_lacks(split: str, tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(tmp_path / "train", pets)
    save_tree(tmp_path / split, {"bird/1.png": pets["dog/1.png"], "fish/1.png": pets["dog/1.png"]})
    with pytest.raises(InputError, match=f"{split} has labels that train lacks: 'bird', 'fish'; add"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["data.zip", "a.tar.doc"])
def test_a_kind_that_is_not_known(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(InputError, match=f"{name}: not a kind of data"):
        open_dataset(tmp_path / name)


@pytest.mark.parametrize("kind", ["a.tar", "c.tar.gz", "d.tgz", "parquet", "csv"])
def test_names_may_end_in_capital_letters(kind: str, tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    path = write_kind(kind, tmp_path, pets, save_tree)
    path = next(path.iterdir()) if path.is_dir() else path
    path = path.rename(path.with_name(path.name.upper()))
    for place in (path, path.parent) if kind == "parquet" else (path,):
        source = open_dataset(place)
        assert source.classes == ("cat", "dog")
        assert np.array_equal(pixels_of(source, 0), next(iter(pets.values())))


def test_shards_may_end_in_capital_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENFUSION_CACHE", str(tmp_path / "cache"))
    folder = write_shards(tmp_path / "data", {"train-0.TAR": 3, "val-0.tar": 2})
    assert open_dataset(folder).splits == ["train"] * 3 + ["val"] * 2
    assert len(open_dataset(folder / "train-0.TAR")) == 3
