import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from making import LIMIT, add, pixels_of, png, write_tar

from tokenfusion.data import tar as tars
from tokenfusion.data.decode import UnreadableImage
from tokenfusion.data.open import open_dataset
from tokenfusion.errors import InputError

Tree = dict[str, np.ndarray]
SaveTree = Callable[[Path, Tree], Path]


def test_imagenette_tar_as_it_is(shared_data: Path) -> None:
    source = open_dataset(shared_data / "imagenette-224.tar")
    assert len(source.classes) == 10
    assert (source.splits.count("train"), source.splits.count("val")) == (4000, 1000)
    assert source.names[0].startswith("train/n01440764/")
    assert source.decode(4999, 10**6).shape == (3, 224, 224)


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
    source = open_dataset(tmp_path / name)
    assert source.splits == ["train"] * 12 + ["val"] * 11
    assert source.ignored == 2
    assert np.array_equal(pixels_of(source, source.names.index("train/cat/hard.png")), pets["dog/3.png"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]  # nothing was unpacked


def test_tar_members_never_reach_outside(tmp_path: Path, pets: Tree) -> None:
    tree = {**pets, "../../escape/1.png": pets["cat/1.png"]}
    source = open_dataset(write_tar(tmp_path / "x.tar", tree))
    assert len(source) == 11
    assert source.ignored == 1


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tar.xz"])
@pytest.mark.parametrize("share", [0.3, 0.5])  # 6,144 and 10,240 bytes of the plain one are whole members
def test_a_truncated_tar_is_refused(name: str, share: float, tmp_path: Path, pets: Tree) -> None:
    path = write_tar(tmp_path / name, pets)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(InputError, match=r"damaged"):
        open_dataset(path)


def test_a_tar_damaged_in_the_middle_is_refused(tmp_path: Path, pets: Tree) -> None:
    path = write_tar(tmp_path / "x.tar", pets)
    data = bytearray(path.read_bytes())
    header = data.index(b"dog/2.png")
    data[header : header + 50] = b"\xff" * 50
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"damaged at byte {header}"):
        open_dataset(path)


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"nonsense" * 1000)
    with pytest.raises(InputError, match="not a tar"):
        open_dataset(tmp_path / "x.tar")


def test_a_tar_that_shrinks_or_vanishes(tmp_path: Path, pets: Tree) -> None:
    path = write_tar(tmp_path / "x.tar", pets)
    source = open_dataset(path)
    os.truncate(path, 600)
    with pytest.raises(UnreadableImage, match=r"x.tar ends inside an image, after 88 of"):
        source.decode(0, LIMIT)
    path.unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        source.decode(0, LIMIT)


def test_a_compressed_tar_beyond_the_memory_limit(tmp_path: Path, pets: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar.gz", pets)
    monkeypatch.setattr(tars, "MEMORY_LIMIT", 500)
    with pytest.raises(InputError, match=r"x.tar.gz: .*GiB.* plain .tar"):
        open_dataset(path)


def test_a_class_folder_given_as_data_is_told_from_its_parent(pets_folder: Path) -> None:
    images = len(list((pets_folder / "cat").iterdir()))
    with pytest.raises(
        InputError, match=rf"cat: {images} images directly in it.*; give its parent {pets_folder}, of which it is"
    ):
        open_dataset(pets_folder / "cat")
