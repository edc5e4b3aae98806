import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import LIMIT, pixels_of
from PIL import Image

from tokenfusion.data.dataset import held_out_name
from tokenfusion.data.decode import UnreadableImage
from tokenfusion.data.open import open_dataset
from tokenfusion.errors import InputError

Tree = dict[str, np.ndarray]
SaveTree = Callable[[Path, Tree], Path]


@pytest.mark.parametrize(
    ("folder", "split"), [("val", "val"), ("valid", "val"), ("validation", "val"), ("test", "test"), ("Test", "test")]
)
def test_split_folders(folder: str, split: str, tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(tmp_path / "train", pets)
    save_tree(tmp_path / folder, {"dog/x.png": pets["dog/1.png"]})
    source = open_dataset(tmp_path)
    assert source.classes == ("cat", "dog")
    assert sorted(source.splits) == sorted(["train"] * 11 + [split])
    assert source.names[source.splits.index(split)] == f"{folder}/dog/x.png"
    assert held_out_name(source) == split


def test_validation_is_preferred_to_test(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    for folder in ("train", "val", "test"):
        save_tree(tmp_path / folder, pets)
    assert held_out_name(open_dataset(tmp_path)) == "val"


def test_a_class_may_be_called_train(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(tmp_path, {"train/1.png": pets["cat/1.png"], "plane/1.png": pets["cat/2.png"]})
    source = open_dataset(tmp_path)
    assert source.classes == ("plane", "train")
    assert source.splits == ["", ""]


def test_files_that_are_no_images_are_ignored_and_counted(pets_folder: Path) -> None:
    for name in ("cat/notes.txt", "cat/.DS_Store", "dog/._1.png", "README.md", "TODO.md", "stray.png"):
        (pets_folder / name).write_bytes(b"x")
    source = open_dataset(pets_folder)
    assert len(source) == 11
    assert source.ignored == 6
    assert source.ignored_in_words() == (
        "6 other files ignored ('README.md', 'cat/notes.txt', 'stray.png' and 3 more: 2 hidden, 1 in no class folder, "
        "3 no image by its name)"
    )


def test_one_ignored_file_of_each_kind_is_named(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    for part in ("other", "train", "val"):
        save_tree(tmp_path / part, pets)
    for name in ("a.HEIC", "b.HEIC", ".hidden.png"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"x")
    source = open_dataset(tmp_path)
    assert source.ignored_in_words() == (
        "14 other files ignored ('other/cat/0.png', 'train/cat/a.HEIC', 'train/cat/.hidden.png' and 11 more: "
        "1 hidden, 11 in no class folder, 2 no image by its name)"
    )


def test_a_folder_of_files_that_cannot_be_read_says_which(tmp_path: Path) -> None:
    for name in ("1.heic", "2.heic"):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / name).write_bytes(b"x")
    with pytest.raises(
        InputError,
        match=r"no image found, 2 other files ignored \('cat/1.heic' and 1 more: 2 no image by its name\); give ",
    ):
        open_dataset(tmp_path)


def test_parquet_and_images_in_class_folders_are_refused(pets_folder: Path) -> None:
    (pets_folder / "cat" / "notes.parquet").write_bytes(b"x")
    with pytest.raises(InputError, match=r"both Parquet files \('cat/notes.parquet'\) and images .*'cat/0.png'"):
        open_dataset(pets_folder)


def test_images_below_a_class_folder_belong_to_the_class(pets_folder: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(pets_folder, {"cat/outdoor/night/7.png": pets["dog/1.png"]})
    source = open_dataset(pets_folder)
    assert source.labels[source.names.index("cat/outdoor/night/7.png")] == 0


def test_folders_that_link_to_themselves_end(pets_folder: Path) -> None:
    (pets_folder / "cat" / "again").symlink_to(pets_folder / "cat")
    (pets_folder / "dog" / "all").symlink_to(pets_folder)
    (pets_folder / "loop").symlink_to(pets_folder)
    (pets_folder / "dog" / "up").symlink_to("../..")
    source = open_dataset(pets_folder)
    assert source.classes == ("cat", "dog")
    assert len(source) == 11


def test_folders_that_link_to_each_other_end(pets_folder: Path) -> None:
    (pets_folder / "cat" / "friends").symlink_to(pets_folder / "dog")
    (pets_folder / "dog" / "friends").symlink_to(pets_folder / "cat")
    assert len(open_dataset(pets_folder)) == 22


def test_linked_class_folders_and_images_are_read(tmp_path: Path, pets_folder: Path, pets: Tree) -> None:
    (tmp_path / "links" / "bird").mkdir(parents=True)
    (tmp_path / "links" / "cat").symlink_to(pets_folder / "cat")
    (tmp_path / "links" / "bird" / "1.png").symlink_to(pets_folder / "dog" / "1.png")
    source = open_dataset(tmp_path / "links")
    assert source.names[0] == "bird/1.png"
    assert np.array_equal(pixels_of(source, 0), pets["dog/1.png"])
    assert len(source) == 6


ODD = ["a b.png", "new\nline.png", 'tab\tand,comma".png', "größe-猫.png", "UPPER.PNG", os.fsdecode(b"latin-\xe9.png")]


@pytest.mark.parametrize("name", ODD)
def test_any_file_name_works(name: str, pets_folder: Path, pets: Tree) -> None:
    Image.fromarray(pets["dog/3.png"]).save(pets_folder / "cat" / name)
    source = open_dataset(pets_folder)
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
    source = open_dataset(pets_folder)
    damage(pets_folder / "cat" / "2.png")
    with pytest.raises(UnreadableImage, match=reason):
        source.decode(2, LIMIT)
    assert len(open_dataset(pets_folder)) in (10, 11)


def test_a_link_to_itself_is_listed_and_found_unreadable(pets_folder: Path) -> None:
    (pets_folder / "cat" / "x.png").symlink_to("x.png")
    source = open_dataset(pets_folder)
    with pytest.raises(UnreadableImage, match="symbolic links"):
        source.decode(source.names.index("cat/x.png"), LIMIT)
