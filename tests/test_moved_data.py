"""Images are known by what they are: data that has moved, or was trained on; and runs that cannot be written."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runs import TINY, interrupt_at
from tokenfusion.data.decoded import read_images
from tokenfusion.data.open import open_dataset
from tokenfusion.errors import InputError
from tokenfusion.recipe import Recipe, load_recipe
from tokenfusion.trained_on import TRAINED_ON, load_trained_on, save_trained_on
from tokenfusion.training import Interrupted, train

WORDS = ("--model", TINY, "--img-size", 8, "--batch-size", 8, "--epochs", 1)


def photos(folder: Path, count: int = 20, seed: int = 0) -> Path:
    """Two classes of noise."""
    random = np.random.default_rng(seed)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(random.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, Path]:
    """Photos and a run on them, which tests copy."""
    folder = tmp_path_factory.mktemp("moved")
    recipe = Recipe(str(photos(folder / "photos")), model=TINY, img_size=(8, 8), batch_size=8, epochs=1)
    train(recipe, folder / "run")
    return folder / "photos", folder / "run"


@pytest.fixture
def placed(ended, tmp_path) -> tuple[Path, Path]:
    """A copy of the photos in another place, and a copy of the run, which was trained on those in the old place."""
    return shutil.copytree(ended[0], tmp_path / "new"), shutil.copytree(ended[1], tmp_path / "run")


def judged(run: Path) -> tuple[dict, list[str]]:
    with (run / "predictions.csv").open(newline="") as file:
        return json.loads((run / "evaluation.json").read_text()), [row["path"] for row in csv.DictReader(file)]


def test_a_run_knows_its_images_by_their_pixels(ended):
    known = load_trained_on(ended[1])
    assert known.training is not None
    assert known.held_out is not None
    assert (len(known.training), len(known.held_out)) == (32, 8)
    assert not set(known.training.tolist()) & set(known.held_out.tolist())


def test_data_that_has_moved_is_judged_as_it_was(placed, command):
    new, run = placed
    assert command("evaluate", run)[0] == 0
    where_it_was, names = judged(run)
    status, output, errors = command("evaluate", run, new)
    assert (status, errors) == (0, "")
    assert "the run was trained on 32 of 40 images: left out; --with-training-images judges them too" in output
    moved, moved_names = judged(run)
    assert moved_names == names
    assert (moved["trained_on"], moved["own"], moved["split"], moved["cross_fitted"]) == (32, True, "val", True)
    assert (where_it_was["trained_on"], where_it_was["trained_on_left_out"]) == (0, False)
    same = set(where_it_was) - {"data", "trained_on", "trained_on_left_out"}
    assert {key: moved[key] for key in same} == {key: where_it_was[key] for key in same}
    assert command("report", run)[0] == 0
    page = (run / "report.html").read_text()
    assert "other data" not in page
    assert "without 32 images that it was trained on" in page


def test_training_images_among_others_are_left_out_unless_asked_for(placed, tmp_path, command):
    new, run = placed
    for name in ("cat", "dog"):
        for image in photos(tmp_path / "more", 5, seed=1).glob(f"{name}/*") if name == "cat" else ():
            shutil.copy(image, new / name / f"another-{image.name}")
    assert command("evaluate", run)[0] == 0
    own = judged(run)
    status, output, _ = command("evaluate", run, new, "--out", run)
    assert status == 0
    assert "the run was trained on 32 of 45 images" in output
    assert (judged(run)[0]["n"], judged(run)[0]["own"]) == (13, False)
    status, output, _ = command("evaluate", run, new, "--with-training-images", "--out", run)
    assert "the run was trained on 32 of 45 images: judged too, which flatters it" in output
    assert judged(run)[0]["n"] == 45
    assert command("evaluate", run)[0] == 0
    assert judged(run) == own
    status, output, _ = command("evaluate", run, tmp_path / "more")
    assert status == 0
    assert "trained on" not in output
    assert command("report", run)[0] == 0
    assert "which is other data than it was trained on" in (run / "report.html").read_text()


def test_nothing_but_training_images_is_refused(placed, tmp_path, command):
    _, run = placed
    trained = [row for row in csv.DictReader((run / "split.csv").open()) if row["split"] == "train"]
    for row in trained:
        (tmp_path / "t" / row["label"]).mkdir(parents=True, exist_ok=True)
        shutil.copy(placed[0] / row["path"], tmp_path / "t" / row["label"])
    status, _, errors = command("evaluate", run, tmp_path / "t")
    assert status == 2
    assert "the run was trained on all 32 images of" in errors
    assert "--with-training-images to judge it by them all the same" in errors
    status, output, _ = command("evaluate", run, "--split", "train")  # which is what is asked for
    assert status == 0
    assert "the run was trained on" not in output


def test_what_is_not_known_is_said(placed, command):
    new, run = placed
    (run / TRAINED_ON).unlink()
    status, output, _ = command("evaluate", run, new)
    assert status == 0
    assert "whether the run was trained on some of these images is not known" in output
    assert "not known" not in command("evaluate", run)[1]
    (run / TRAINED_ON).write_bytes(b"x" * 99)
    assert command("evaluate", run, new)[0] == 2


def test_another_folder_is_written_to_where_the_run_cannot_be(placed, tmp_path, command, monkeypatch):
    _, run = placed
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    status, output, _ = command("evaluate", run, "--out", tmp_path / "elsewhere")
    assert status == 0
    assert f"written to {tmp_path / 'elsewhere' / 'evaluation.json'}" in output.replace("\n", "")
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} >= {"evaluation.json", "predictions.csv"}
    monkeypatch.setattr("os.access", lambda *_: False)  # as of a file system that is mounted read-only
    status, _, errors = command("evaluate", run)
    assert status == 2
    assert "cannot be written; give another folder by --out DIR" in errors


def test_a_run_goes_on_where_its_images_are_now(tmp_path, command):
    old, run = photos(tmp_path / "old"), tmp_path / "run"
    recipe = Recipe(str(old), model=TINY, img_size=(8, 8), batch_size=8, epochs=2)
    with pytest.raises(Interrupted):
        train(recipe, run, progress=interrupt_at(2))
    new = tmp_path / "far" / "away"
    new.parent.mkdir()
    old.rename(new)
    status, _, errors = command("train", "--resume", run)
    assert status == 2
    assert f"where the images have moved, say so by `tokenfusion train --resume {run} --data NEW`" in errors.replace(
        "\n", " "
    )
    other = photos(tmp_path / "other", seed=3)  # of the same names
    status, _, errors = command("train", "--resume", run, "--data", other)
    assert status == 2
    assert "the pixels of the training images" in errors.replace("\n", " ")
    assert load_recipe(run / "recipe.toml")["data"] == str(old)
    status, _, errors = command("train", "--resume", run, "--data", new)
    assert status == 0, errors
    assert load_recipe(run / "recipe.toml")["data"] == str(new)
    assert (run / "model.safetensors").exists()


def test_a_finished_run_is_told_where_its_images_are_now(placed, tmp_path, command):
    new, run = placed
    status, _, errors = command("train", "--resume", run, "--data", photos(tmp_path / "other", seed=3))
    assert status == 2
    assert "the pixels of the training images" in errors.replace("\n", " ")
    status, _, errors = command("train", "--resume", run, "--data", new)
    assert status == 0, errors
    assert load_recipe(run / "recipe.toml")["data"] == str(new)
    shutil.rmtree(run / "state")
    status, _, errors = command("train", "--resume", run, "--data", tmp_path / "other")
    assert status == 2
    assert "does not have the images that" in errors.replace("\n", " ")
    assert command("train", "--resume", run, "--data", new)[0] == 0


def test_a_list_that_has_moved_with_its_root(tmp_path, command):
    old, run = photos(tmp_path / "old" / "img"), tmp_path / "run"
    rows = "".join(f"{old / name / f'{n}.png'},{name}\n" for name in ("cat", "dog") for n in range(20))
    (tmp_path / "old" / "x.csv").write_text("path,label\n" + rows)
    assert command("train", tmp_path / "old" / "x.csv", "--root", old, *WORDS, "--out", run)[0] == 0
    (tmp_path / "old").rename(tmp_path / "new")
    status, output, errors = command("evaluate", run, tmp_path / "new" / "x.csv", "--root", tmp_path / "new" / "img")
    assert status == 0, errors
    assert "the run was trained on 32 of 40 images" in output
    places = ("--data", tmp_path / "new" / "x.csv", "--root", tmp_path / "new" / "img")
    status, _, errors = command("train", "--resume", run, *places)
    assert status == 0, errors
    assert command("evaluate", run)[0] == 0


def test_a_run_that_was_moved_together_with_its_images_is_judged_by_them(tmp_path, command):
    old = tmp_path / "old"
    photos(old / "img")
    rows = "".join(f"{old / 'img' / name / f'{n}.png'},{name}\n" for name in ("cat", "dog") for n in range(20))
    (old / "x.csv").write_text("path,label\n" + rows)
    assert command("train", old / "img", *WORDS, "--out", old / "runs" / "a")[0] == 0
    assert command("train", old / "x.csv", "--root", old / "img", *WORDS, "--out", old / "runs" / "b")[0] == 0
    was = [json.loads(command("evaluate", old / "runs" / name, "--json")[1]) for name in "ab"]
    old.rename(tmp_path / "new")
    for name, before, data in zip("ab", was, ("img", "x.csv"), strict=True):
        status, output, errors = command("evaluate", tmp_path / "new" / "runs" / name)
        assert (status, errors) == (0, "")
        assert f"the images were moved along with the run, to {tmp_path / 'new' / data}" in output
        now = judged(tmp_path / "new" / "runs" / name)[0]
        assert (now["own"], now["n"], now["top1"]) == (True, before["n"], before["top1"])
    assert command("report", tmp_path / "new" / "runs" / "a")[0] == 0


def test_a_folder_called_digits_is_not_looked_for_where_the_built_in_data_was_trained_on(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    images, _ = read_images(open_dataset("digits"), range(2), max_pixels=64, cache_bytes=0)
    save_trained_on(tmp_path, Recipe("digits"), images, images)
    assert load_trained_on(tmp_path).from_here == {}


def test_options_but_where_the_images_are_stay_refused(placed, command):
    status, _, errors = command("train", "--resume", placed[1], "--lr", 1)
    assert status == 2
    assert "leave out --lr" in errors
    with pytest.raises(InputError):
        load_trained_on_damaged(placed[1])


def load_trained_on_damaged(run: Path) -> None:
    (run / TRAINED_ON).write_bytes(b"damaged")
    load_trained_on(run)


def test_pictures_on_both_sides_of_the_split_are_judged_and_said(tmp_path, command):
    folder, run = photos(tmp_path / "x", 9), tmp_path / "run"
    for image in (folder / "cat").iterdir():
        shutil.copy(image, image.with_name(f"again-{image.name}"))
    assert command("train", folder, *WORDS, "--seed", 1, "--out", run)[0] == 0
    status, output, _ = command("evaluate", run)
    assert status == 0
    found = judged(run)[0]
    assert found["trained_on"] > 0
    assert f"the run was trained on {found['trained_on']} of {found['n']} images: judged too" in output
    shutil.copytree(folder, tmp_path / "new")
    command("evaluate", run, tmp_path / "new")
    assert judged(run)[0]["top1"] == found["top1"]
    assert judged(run)[0]["n"] == found["n"]
