"""A run from Python: in any thread, told of every step, with a classifier at the end."""

import runpy
import shutil
import signal
import threading
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

import tokenfusion
from runs import assert_same, interrupt_at, tiny_recipe
from tokenfusion import Classifier, InputError
from tokenfusion.checkpoint import load_tensors
from tokenfusion.data.loader import TrainLoader
from tokenfusion.files import lock_folder
from tokenfusion.training import Interrupted, identity, resume, start

QUIET = Console(quiet=True)
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in the main thread, the classifier that it gave, and what it told."""
    run, told = tmp_path_factory.mktemp("python") / "run", []
    return run, tokenfusion.train(tiny_recipe(), run, progress=told.append), told


def test_it_is_told_of_every_step_and_every_epoch(whole):
    told = whole[2]
    assert [update.step for update in told] == [*range(1, 12), 11, *range(12, 23), 22]
    assert [update.epoch for update in told] == [1] * 12 + [2] * 12
    assert {(update.steps, update.epochs) for update in told} == {(22, 2)}
    epochs = [update for update in told if update.record]
    assert [update.step for update in epochs] == [11, 22]
    for update in epochs:
        assert update.record["train_loss"] == update.loss
        assert update.record["train_top1"] == update.score
    assert epochs[0].seconds_left > epochs[1].seconds_left == 0


def test_it_gives_the_classifier_that_the_run_folder_holds(whole, digit):
    run, classifier, _ = whole
    loaded = Classifier.load(run)
    assert not classifier.model.training
    assert classifier.predict(digit) == loaded.predict(digit)
    assert classifier.classes == loaded.classes == tuple("0123456789")


def test_a_thread_that_is_not_the_main_one_trains_the_same(whole, tmp_path):
    before, results = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: results.append(tokenfusion.train(tiny_recipe(), tmp_path / "run")))
    thread.start()
    thread.join()
    assert isinstance(results[0], Classifier)
    assert signal.getsignal(signal.SIGINT) is before
    assert_same(tmp_path / "run", whole[0])


def test_a_classifier_and_an_update_are_a_line_to_look_at(whole):
    classifier, update = whole[1], whole[2][0]
    assert repr(classifier).startswith("<Classifier: fuse(wide(resnet_micro")
    assert repr(classifier).endswith("8×8, 10 classes: 0, 1, 2, 3, 4, ...>")
    assert repr(update).startswith("<Update: epoch 1/2, step 1/22, loss ")
    assert len(repr(whole[2][11])) < 120


def test_what_progress_raises_ends_the_training(tmp_path):
    def refuse(update):
        raise KeyError(update.step)

    with pytest.raises(KeyError, match="1"):
        tokenfusion.train(tiny_recipe(), tmp_path / "run", progress=refuse)


def test_ctrl_c_in_the_main_thread_saves_the_run(whole, tmp_path):
    with pytest.raises(Interrupted):
        tokenfusion.train(tiny_recipe(), tmp_path / "run", progress=interrupt_at(15))
    assert load_tensors(tmp_path / "run" / "state" / "last.safetensors")[1]["step"] == 15
    resume(tmp_path / "run", QUIET)
    assert_same(tmp_path / "run", whole[0])


def test_a_folder_that_holds_a_run_is_refused(whole):
    with pytest.raises(InputError, match="holds a run already; go on with"):
        tokenfusion.train(tiny_recipe(), whole[0])


def test_two_trainings_into_one_folder_leave_it_to_the_first(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with lock_folder(run), pytest.raises(InputError, match="another process is writing there"):
        tokenfusion.train(tiny_recipe(), run)  # neither has written anything
    said = []

    def train_as_well(_update):
        for second in (lambda: resume(run, QUIET), lambda: tokenfusion.train(tiny_recipe(seed=1), run)):
            with pytest.raises(InputError) as refused:
                second()
            said.append(str(refused.value))
        raise KeyError("enough")

    with pytest.raises(KeyError):
        tokenfusion.train(tiny_recipe(), run, progress=train_as_well)
    assert "another process is writing there" in said[0]
    assert "holds a run already" in said[1]


def test_a_run_inside_its_images_is_refused_before_anything_is_written(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    with pytest.raises(InputError, match="lies inside the images"):
        tokenfusion.train(tiny_recipe(data=str(tmp_path / "photos")), tmp_path / "photos" / "run")
    assert sorted(path.name for path in tmp_path.glob("photos/*")) == ["a", "b"]


def test_the_example_trains(tmp_path, capsys):
    runpy.run_path(str(EXAMPLES / "train.py"))["main"](tmp_path / "run", epochs=1)
    said = capsys.readouterr().out
    assert "epoch 1 of 1: accuracy " in said
    assert Classifier.load(tmp_path / "run").name == "vit_micro"


# What a run must be the same in to go on.


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder of images and a run beside it that was stopped after three steps, and the same run to its end."""
    place = tmp_path_factory.mktemp("place")
    for index in range(40):
        path = place / "photos" / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (5 * index, 90 * (index % 2), 7)).save(path)
    recipe = tiny_recipe(data=str(place / "photos"), batch_size=8)
    start(recipe, place / "whole", QUIET)
    with pytest.raises(Interrupted):
        start(recipe, place / "runs" / "run", QUIET, listener=interrupt_at(3))
    return place


def test_data_and_run_that_were_moved_together_go_on(stopped, tmp_path):
    place = tmp_path / "elsewhere"
    for name in ("photos", "runs"):
        shutil.copytree(stopped / name, place / name)
    recipe, header = place / "runs" / "run" / "recipe.toml", "# Chosen by measuring: lr.\n"
    recipe.write_text(header + recipe.read_text())
    photos = stopped / "photos"
    photos.rename(stopped / "gone")
    try:
        resume(place / "runs" / "run", QUIET)
    finally:
        (stopped / "gone").rename(photos)
    assert_same(place / "runs" / "run", stopped / "whole")
    assert str(place / "photos") in recipe.read_text()
    assert recipe.read_text().startswith(header + "data = ")


def test_a_recipe_stays_as_it_is_where_the_images_that_were_moved_are_others(stopped, tmp_path):
    for name in ("photos", "runs"):
        shutil.copytree(stopped / name, tmp_path / name)
    (tmp_path / "photos" / "a" / "00.png").unlink()
    recipe = tmp_path / "runs" / "run" / "recipe.toml"
    text = recipe.read_text().replace(str(stopped / "photos"), str(stopped / "gone"))
    recipe.write_text(text)
    (recipe.parent / "split.csv").unlink()
    with pytest.raises(InputError, match="are not those that the run began with"):
        resume(recipe.parent, QUIET)
    assert recipe.read_text() == text


def test_batches_end_where_the_log_cannot_be_opened(stopped, tmp_path, monkeypatch):
    run, closed, close = shutil.copytree(stopped / "runs" / "run", tmp_path / "run"), [], TrainLoader.close
    shutil.rmtree(run / "events")
    (run / "events").write_text("a file")
    monkeypatch.setattr(TrainLoader, "close", lambda loader: closed.append(close(loader)))
    with pytest.raises(FileExistsError):
        resume(run, QUIET)
    assert closed


def test_data_that_was_moved_alone_goes_on_where_the_recipe_says(stopped, tmp_path):
    shutil.copytree(stopped / "photos", tmp_path / "pictures")
    run = shutil.copytree(stopped / "runs" / "run", tmp_path / "run")
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace(str(stopped / "photos"), str(tmp_path / "pictures")))
    resume(run, QUIET)
    assert_same(run, stopped / "whole")


def test_a_new_field_with_its_default_orphans_no_run(stopped, tmp_path, monkeypatch):
    """As if the run were of a time when recipes had no `drop_path`, and then one when its default is another."""
    run = shutil.copytree(stopped / "runs" / "run", tmp_path / "run")
    known = tuple(name for name in identity.FIELDS if name not in ("crop_padding", "hflip"))
    with monkeypatch.context() as patch:
        patch.setattr(identity, "FIELDS", known)
        with pytest.raises(Interrupted):
            resume(run, QUIET, listener=interrupt_at(5))
    assert "crop_padding" not in load_tensors(run / "state" / "last.safetensors")[1]["identity"]["recipe"]
    with pytest.raises(
        InputError, match=r"hflip=0\.0 \(it was 0\.5\) are not those"
    ):  # the recipe has no default there
        resume(run, QUIET)
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("hflip = 0.0", "hflip = 0.5"))
    resume(run, QUIET)
    assert (run / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda photos: (photos / "a" / "00.png").rename(photos / "a" / "0.png"), "names of the .* images"),
        (lambda photos: Image.new("RGB", (8, 8)).save(photos / "b" / "01.png"), "pixels of the .* images"),
    ],
    ids=["renamed", "painted over"],
)
def test_images_that_differ_are_named(stopped, tmp_path, harm, said):
    run = shutil.copytree(stopped / "runs" / "run", tmp_path / "run")
    photos = shutil.copytree(stopped / "photos", tmp_path / "photos")
    harm(photos)
    text = (run / "recipe.toml").read_text().replace(str(stopped / "photos"), str(photos))
    (run / "recipe.toml").write_text(text)
    (run / "split.csv").unlink()
    with pytest.raises(InputError, match=f"the {said} .*are not those that the run began with"):
        resume(run, QUIET)
