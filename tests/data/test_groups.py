"""Images of one thing stay on one side of a split."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runs import TINY
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.groups import suspected_groups
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import choose_split
from tokenfusion.errors import InputError
from tokenfusion.recipe import Reading


def patients(folder: Path, **reading: str) -> Dataset:
    """Ten patients a class, three pictures each."""
    for c in ("ill", "well"):
        (folder / c).mkdir(parents=True, exist_ok=True)
        for patient in range(10):
            for shot in range(3):
                (folder / c / f"{c}p{patient}_{shot}.png").write_bytes(b"x")
    return open_dataset(folder, reading=Reading(**reading))


@pytest.mark.parametrize("seed", range(4))
def test_whole_groups_are_held_out_of_each_class(seed: int, tmp_path: Path) -> None:
    source = patients(tmp_path, group_by=r"/(\w+)_\d+\.png$")
    split = choose_split(source, 0.2, seed)
    assert source.groups is not None
    assert not set(source.groups[split.train]) & set(source.groups[split.val])
    assert np.bincount(source.labels[split.val]).tolist() == [6, 6]
    assert len(split.train) + len(split.val) == 60
    assert any(note.startswith("groups by ") and note.endswith(": 20") for note in source.notes)


def test_a_column_names_the_groups_of_a_list(tmp_path: Path) -> None:
    rows = "".join(f"{n}.png,{'ab'[n // 2 % 2]},{n // 4},x{n}\n" for n in range(24))
    (tmp_path / "x.csv").write_text("path,label,group,note\n" + rows)
    source = open_dataset(tmp_path / "x.csv")
    split = choose_split(source, 0.3, seed=0)
    assert source.groups is not None
    assert not set(source.groups[split.train]) & set(source.groups[split.val])


def test_groups_that_cannot_be_kept_apart_are_refused(tmp_path: Path) -> None:
    for pattern, reason in (("(", "is no regular expression"), ("zebra", "matches no image's name, such as 'ill/")):
        with pytest.raises(InputError, match=reason):
            patients(tmp_path / "a", group_by=pattern)
    with pytest.raises(InputError, match=r"a class has none left to train on, such as '(ill|well)'"):
        choose_split(patients(tmp_path / "a", group_by="^(ill|well)"), 0.2, seed=0)
    with pytest.raises(InputError, match="all images are of one group"):
        choose_split(patients(tmp_path / "a", group_by="png"), 0.2, seed=0)
    for part in ("train", "val"):
        for c in ("a", "b"):
            (tmp_path / "b" / part / c).mkdir(parents=True)
            (tmp_path / "b" / part / c / f"{c}1_{part}.png").write_bytes(b"x")
    with pytest.raises(InputError, match="2 groups of images on both sides of the data's own split, such as that of"):
        open_dataset(tmp_path / "b", reading=Reading(group_by=r"(\w\d)_"))


def test_names_that_differ_by_a_counter_are_suspected(tmp_path: Path) -> None:
    assert "3 that begin with 'ill/illp0'" in suspected_groups(patients(tmp_path / "a"))
    assert suspected_groups(patients(tmp_path / "a", group_by=r"/(\w+)_\d+")) == ""
    for c in ("a", "b"):
        (tmp_path / "b" / c).mkdir(parents=True)
        for n in range(9):
            (tmp_path / "b" / c / f"{c}_{n}.png").write_bytes(b"x")  # numbered, and that is all
    assert suspected_groups(open_dataset(tmp_path / "b")) == ""


def test_a_group_that_is_nearly_a_class_is_not_suspected(tmp_path: Path) -> None:
    """As in photographs of two cameras, or those of ImageNet, whose names begin with their class."""
    for c in ("a", "b"):
        (tmp_path / c).mkdir()
        for n in range(12):
            for prefix in ("IMG", "n0144", "DSC")[: 2 + (n < 4)]:
                (tmp_path / c / f"{prefix}_{n}.png").write_bytes(b"x")
    assert suspected_groups(open_dataset(tmp_path)) == ""


def test_an_evaluation_says_that_its_interval_is_of_groups(command, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for c in ("ill", "well"):
        (tmp_path / "x" / c).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "x" / c / f"{c}p{number // 4}_{number % 4}.png")
    run, words = tmp_path / "run", ("--model", TINY, "--img-size", 8, "--batch-size", 8, "--epochs", 1)
    assert command("train", tmp_path / "x", "--group-by", r"/(\w+)_\d", *words, "--out", run)[0] == 0
    status, output, _ = command("evaluate", run)
    assert status == 0
    assert ", of whole groups, 2 of them)" in output
    assert command("report", run)[0] == 0
    assert "of whole groups, 2 of them" in (run / "report.html").read_text()
    assert json.loads((run / "evaluation.json").read_text())["groups"] == 2
    assert (run / "predictions.csv").read_text().startswith("path,label,prediction,score,group")
    for c in ("ill", "well"):  # other data, whose names tell no group
        (tmp_path / "y" / c).mkdir(parents=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "y" / c / "z.png")
    status, output, errors = command("evaluate", run, tmp_path / "y")
    assert (status, errors) == (0, "")
    assert "groups" not in output
