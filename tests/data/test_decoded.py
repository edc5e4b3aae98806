import csv
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenfusion.data.decode import UnreadableImage
from tokenfusion.data.decoded import (
    Images,
    Skipped,
    read_images,
    read_skipped,
    require_every_class,
    skipped_in,
    write_skipped,
)
from tokenfusion.data.open import open_dataset
from tokenfusion.data.readers import Pixels
from tokenfusion.errors import InputError

Tree = dict[str, np.ndarray]
LIMIT = 10_000


def read(
    folder: Path, indices: Any = range(11), cache_bytes: int = 10**6, **options: Any
) -> tuple[Images, list[Skipped]]:
    return read_images(open_dataset(folder), indices, max_pixels=LIMIT, cache_bytes=cache_bytes, **options)


def total_bytes(pets: Tree) -> int:
    return sum(pixels.nbytes for pixels in pets.values())


@pytest.mark.parametrize("spare", [0, -1])
def test_images_are_cached_when_they_fit_to_the_byte(spare: int, pets_folder: Path, pets: Tree) -> None:
    images, skipped = read(pets_folder, cache_bytes=total_bytes(pets) + spare)
    assert images.cached is (spare == 0)
    assert skipped == []
    assert len(images) == 11
    for index, (name, pixels) in enumerate(pets.items()):
        assert images.names[index] == name
        assert images[index].dtype == torch.uint8
        assert np.array_equal(images[index].permute(1, 2, 0), pixels)


def test_labels_and_order_follow_the_indices(pets_folder: Path, pets: Tree) -> None:
    order = [9, 0, 5, 4]
    images, _ = read(pets_folder, np.array(order))
    assert images.names == [list(pets)[index] for index in order]
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == [1, 0, 1, 0]
    assert np.array_equal(images[2].permute(1, 2, 0), pets["dog/0.png"])


def test_the_cache_needs_no_files_and_survives_a_pickle(pets_folder: Path, pets: Tree) -> None:
    images, _ = read(pets_folder)
    for name in pets:
        (pets_folder / name).unlink()
    copy = pickle.loads(pickle.dumps(images))
    assert np.array_equal(copy[10].permute(1, 2, 0), pets["dog/5.png"])
    assert isinstance(images.dataset.reader, Pixels)
    assert images.dataset.reader.pixels.numel() == total_bytes(pets)


def test_unreadable_images_are_set_aside_with_their_reasons(pets_folder: Path, pets: Tree) -> None:
    whole = (pets_folder / "cat/1.png").read_bytes()
    (pets_folder / "cat/1.png").write_bytes(whole[:60])
    (pets_folder / "cat/3.png").write_bytes(b"")
    (pets_folder / "dog/0.png").write_text("text")
    source = open_dataset(pets_folder)
    (pets_folder / "dog/5.png").unlink()
    images, skipped = read_images(source, range(11), max_pixels=80, cache_bytes=10**6, split="train")
    assert [(image.path, image.label, image.split) for image in skipped] == [
        ("cat/1.png", "cat", "train"),
        ("cat/3.png", "cat", "train"),
        ("cat/4.png", "cat", "train"),  # 9 × 9 = 81 pixels
        ("dog/0.png", "dog", "train"),
        ("dog/5.png", "dog", "train"),
    ]
    for image, reason in zip(
        skipped, ["damaged", "0 bytes", "max_pixels=80", "not an image", "No such file"], strict=True
    ):
        assert reason in image.reason
    assert images.names == ["cat/0.png", "cat/2.png", "dog/1.png", "dog/2.png", "dog/3.png", "dog/4.png"]
    assert images.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert np.array_equal(images[2].permute(1, 2, 0), pets["dog/1.png"])  # none stands in for another


def test_without_a_cache_unreadable_images_are_left_out_too(pets_folder: Path, pets: Tree) -> None:
    (pets_folder / "cat/1.png").write_bytes(b"")
    images, skipped = read(pets_folder, cache_bytes=0)
    assert len(images) == 10
    assert len(skipped) == 1
    assert np.array_equal(images[1].permute(1, 2, 0), pets["cat/2.png"])


def test_an_image_that_vanishes_later_is_named(pets_folder: Path) -> None:
    images, _ = read(pets_folder, cache_bytes=0)
    (pets_folder / "dog/2.png").unlink()
    with pytest.raises(UnreadableImage, match=r"dog/2.png: .*No such file.*readable before"):
        images[7]


def test_none_readable_at_all(pets_folder: Path, pets: Tree) -> None:
    for name in pets:
        os.truncate(pets_folder / name, 0)
    images, skipped = read(pets_folder)
    assert len(images) == 0
    assert len(skipped) == 11


def test_a_class_with_no_readable_image_is_named(pets_folder: Path) -> None:
    for path in (pets_folder / "cat").iterdir():
        os.truncate(path, 0)
    images, skipped = read(pets_folder, split="train")
    with pytest.raises(InputError, match=r"of class 'cat' \(the first is cat/\S+: the file is empty .*\); replace"):
        require_every_class(images, ("cat", "dog"), skipped)
    require_every_class(images, ("cat", "dog")[:0])


def test_progress_ends_at_the_total() -> None:
    calls: list[tuple[int, int]] = []
    source = open_dataset("digits")
    read_images(
        source, range(200), max_pixels=LIMIT, cache_bytes=0, progress=lambda done, total: calls.append((done, total))
    )
    assert calls[-1] == (200, 200)
    assert calls == sorted(calls)
    assert 3 <= len(calls) <= 20


def test_digits_are_cached_as_three_equal_channels() -> None:
    source = open_dataset("digits")
    images, _ = read_images(source, [5, 17], max_pixels=LIMIT, cache_bytes=2 * 3 * 64)
    assert images.cached
    assert torch.equal(images[1], source.decode(17, LIMIT))


def test_skipped_is_a_csv_of_any_names(tmp_path: Path) -> None:
    rows = [['new\r\nline,".png', "größe", "val", "damaged image: it is"], ["b.png", "猫", "", "no"]]
    write_skipped(tmp_path / "skipped.csv", [Skipped(*row) for row in rows])
    with open(tmp_path / "skipped.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["path", "label", "split", "reason"], *rows]
    assert read_skipped(tmp_path / "skipped.csv") == [Skipped(*row) for row in rows]
    assert read_skipped(tmp_path / "skipped-1.csv") == []
    write_skipped(tmp_path / "skipped-1.csv", [Skipped("c.png", "", "train", "no")])
    assert [image.path for image in skipped_in(tmp_path)] == ["c.png", *(row[0] for row in rows)]
    (tmp_path / "skipped.csv").write_text("path,label,split,reason\na,b\n")
    with pytest.raises(InputError, match=r"skipped\.csv line 2 is cut short; restore it"):
        read_skipped(tmp_path / "skipped.csv")
