import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import choose_split, read_split, write_split
from tokenfusion.errors import InputError

Tree = dict[str, np.ndarray]
SaveTree = Callable[[Path, Tree], Path]


def test_a_drawn_split_is_stratified_whole_and_disjoint() -> None:
    source = open_dataset("digits")
    split = choose_split(source, 0.2, seed=3)
    assert sorted([*split.train, *split.val]) == list(range(1797))
    for label in range(10):
        images, held_out = (source.labels == label).sum(), (source.labels[split.val] == label).sum()
        assert abs(held_out - 0.2 * images) <= 0.5


def test_the_seed_decides_the_split() -> None:
    source = open_dataset("digits")
    one, same, other = (choose_split(source, 0.2, seed) for seed in (2**63 - 1, 2**63 - 1, 0))
    assert np.array_equal(one.val, same.val)
    assert not np.array_equal(one.val, other.val)
    assert (np.diff(one.train) > 0).all()


@pytest.mark.parametrize("fraction", [0.01, 0.9])
def test_each_class_has_an_image_on_each_side(fraction: float, pets_folder: Path) -> None:
    source = open_dataset(pets_folder)
    split = choose_split(source, fraction, seed=0)
    assert set(source.labels[split.train]) == set(source.labels[split.val]) == {0, 1}


def test_a_class_too_small_to_split(pets_folder: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(pets_folder, {"emu/1.png": pets["cat/1.png"]})
    with pytest.raises(InputError, match=r"class 'emu' has 1 training images; it needs at least 2, .*Add images"):
        choose_split(open_dataset(pets_folder), 0.2, seed=0)


def test_a_class_folder_without_images(pets_folder: Path) -> None:
    (pets_folder / "emu").mkdir()
    source = open_dataset(pets_folder)
    assert source.classes == ("cat", "dog")
    assert "warning: class 'emu' is left out, because its folder holds no image" in source.notes


def save_parts(root: Path, parts: list[str], pets: Tree, save_tree: SaveTree) -> Dataset:
    for part in parts:
        save_tree(root / part, pets)
    return open_dataset(root)


def test_the_datas_own_split_is_kept(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    source = save_parts(tmp_path, ["train", "test", "val"], pets, save_tree)
    split = choose_split(source, 0.5, seed=1)
    assert {source.splits[index] for index in split.train} == {"train"}
    assert {source.splits[index] for index in split.val} == {"val"}
    assert len(split.train) == len(split.val) == 11


def test_training_images_alone_are_split(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    split = choose_split(save_parts(tmp_path, ["train"], pets, save_tree), 0.5, seed=1)
    assert sorted([*split.train, *split.val]) == list(range(11))


def test_held_out_images_alone_cannot_be_trained_on(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    source = save_parts(tmp_path, ["val", "test"], pets, save_tree)
    assert set(source.splits) == {"val", "test"}
    with pytest.raises(InputError, match="class 'cat' has 0 training images"):
        choose_split(source, 0.5, seed=1)


def test_a_written_split_is_read_back(tmp_path: Path, pets_folder: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(pets_folder, {'cat/new\r\nline,"quoted".png': pets["cat/1.png"]})
    source = open_dataset(pets_folder)
    split = choose_split(source, 0.3, seed=5)
    write_split(tmp_path / "split.csv", source, split)
    again = read_split(tmp_path / "split.csv", source)
    assert np.array_equal(again.train, split.train)
    assert np.array_equal(again.val, split.val)
    assert (tmp_path / "split.csv").read_text().startswith("path,label,split\ncat/0.png,cat,")


def test_images_in_neither_part_stay_out(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    source = save_parts(tmp_path / "data", ["train", "test", "val"], pets, save_tree)
    write_split(tmp_path / "split.csv", source, choose_split(source, 0.2, seed=0))
    again = read_split(tmp_path / "split.csv", source)
    assert len(again.train) == len(again.val) == 11
    assert len(source) == 33


def test_data_that_changed_is_refused_by_its_first_difference(tmp_path: Path, pets_folder: Path) -> None:
    source = open_dataset(pets_folder)
    path = tmp_path / "split.csv"
    write_split(path, source, choose_split(source, 0.2, seed=0))
    shutil.move(pets_folder / "cat" / "3.png", pets_folder / "dog" / "7.png")
    with pytest.raises(InputError, match=r"image 3 was \['cat/3.png', 'cat'\] .* and is \['cat/4.png', 'cat'\] now"):
        read_split(path, open_dataset(pets_folder))
    shutil.move(pets_folder / "dog" / "7.png", pets_folder / "cat" / "3.png")
    shutil.copy(pets_folder / "dog" / "5.png", pets_folder / "dog" / "8.png")
    with pytest.raises(InputError, match=r"image 11 was None .* and is \['dog/8.png', 'dog'\]"):
        read_split(path, open_dataset(pets_folder))
    relabelled = dataclasses.replace(source, classes=("cat", "wolf"))
    with pytest.raises(InputError, match=r"image 5 was \['dog/0.png', 'dog'\] .* 'wolf'"):
        read_split(path, relabelled)


def test_a_split_file_that_is_none(tmp_path: Path, pets_folder: Path) -> None:
    source = open_dataset(pets_folder)
    path = tmp_path / "split.csv"
    with pytest.raises(InputError, match="cannot be read"):
        read_split(path, source)
    for text in ("", "a,b\n", "path,label,split\nx,y\n"):
        path.write_text(text)
        with pytest.raises(InputError, match="not the split of a run"):
            read_split(path, source)
