"""From pretrained weights to a run, through the depths of training: timm's small test models on a folder of photos."""

import csv
import json
import os
import re
import shutil
import signal
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

from children import begin
from runs import TINY_PARENTS, assert_same, interrupt_at
from tokenfusion import Classifier, InputError, Recipe, features, fuse
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import choose_split
from tokenfusion.preset import FINE_TUNING, KEPT_TOKENS, at_depth, preset
from tokenfusion.recipe import Depth
from tokenfusion.training import Interrupted, resume, stages, start
from tokenfusion.training.auto.depth import deepest_within
from tokenfusion.training.loop import fit

QUIET = Console(quiet=True)
CNN, VIT = TINY_PARENTS
MODEL = f"fuse({CNN},{VIT},probe,add)"


def photo(path, label, number):
    """An image whose brighter half tells its class, under noise."""
    chance = np.random.default_rng([label, number])
    pixels = chance.integers(0, 160, (36, 36, 3))
    half = (slice(None, 18), slice(None)) if label == 0 else (slice(18, None), slice(None))
    pixels[half if label < 2 else (slice(None), slice(None, 18))] += 60
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(("above", "below", "left")):
        for number in range(14):
            photo(folder / name / f"{number}.png", label, number)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENFUSION_CACHE", str(folder))
        yield folder / "features"


def recipe_of(photos, parent_files, **changes):
    values = {
        "data": str(photos), "model": MODEL, "pretrained": parent_files, "img_size": (64, 64), "tune": "all",
        "epochs": 2, "batch_size": 8, "optimizer": "adamw", "lr": 1e-3, "backbone_lr": 0.1, "head_lr": 0.1,
        "layer_decay": 0.7, "fix_batchnorm": True, "ema": 0.9, "precision": "fp32",
    }  # fmt: skip
    return Recipe(**values | changes)


@pytest.fixture
def keep_all(monkeypatch):
    """Every stage is kept, whatever the images that are set aside say."""
    rising = count()
    monkeypatch.setattr("tokenfusion.training.stages.validate", lambda *_: (0.0, float(next(rising))))


@pytest.fixture(scope="module")
def deepest(photos, parent_files, tmp_path_factory):
    run, rising = tmp_path_factory.mktemp("runs") / "all", count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenfusion.training.stages.validate", lambda *_: (0.0, float(next(rising))))
        start(recipe_of(photos, parent_files), run, QUIET)
    return run


def test_a_run_through_all_stages_is_a_run_like_any_other(deepest, photos, tmp_path, command):
    run = shutil.copytree(deepest, tmp_path / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(1, len(records) + 1))
    assert len(records) == KEPT_TOKENS["epochs"] + 2
    assert json.loads((run / "stages.json").read_text())["kept"] == ["fusion", "all"]
    assert [path.name for path in (run / "state").iterdir()] == ["last.safetensors"]
    top1 = json.loads(command("evaluate", run, "--json")[1])["top1"]
    assert top1 == pytest.approx(records[-1]["val_top1"])
    image = photos / "left" / "0.png"
    assert command("predict", run, image)[0] == 0
    assert command("explain", run, image)[0] == 0
    assert command("analyze", "tokens", run)[0] == 0
    tokens = json.loads((run / "tokens" / "tokens.json").read_text())
    assert {row["tokens"] for row in tokens["replaced"]} >= {"pixel", "patch"}
    assert command("analyze", "collapse", run)[0] == 0
    assert command("report", run)[0] == 0
    page = (run / "report.html").read_text()
    assert "Fusing is" in page
    assert "kept: fusion on kept tokens and fine-tuning of all weights" in page
    assert command("train", "--resume", run)[0] == 0
    described = json.loads((run / "model.json").read_text())
    assert [file["model"] for file in described["began_with"]] == [CNN, VIT]


def test_the_most_similar_training_image_of_one_is_itself(deepest, photos, command):
    names = [line.split(",") for line in (deepest / "split.csv").read_text().splitlines()]
    path = next(row[0] for row in names if row[2] == "train")
    status, output, errors = command("similar", deepest, photos / path, photos / path, "--topk", 3, "--json")
    assert status == 0, errors
    found = json.loads(output)
    assert len(found) == 6
    assert (found[0]["path"], found[0]["label"]) == (path, path.split("/")[0])
    assert found[0]["likeness"] == pytest.approx(1, abs=1e-3)
    assert found[0]["likeness"] > found[1]["likeness"] >= found[2]["likeness"]


def test_predictions_and_mistakes_stand_beside_the_training_images_that_are_nearest(deepest, photos, tmp_path, command):
    run = shutil.copytree(deepest, tmp_path / "run")
    held_out = [line.split(",")[0] for line in (run / "split.csv").read_text().splitlines() if line.endswith("val")]
    image = photos / held_out[0]
    status, output, errors = command("predict", run, image, tmp_path / "none.png", "--explain-by-example", "--json")
    assert (status, "1 of the images could not be read" in errors) == (1, True), errors
    predicted, missing = map(json.loads, output.splitlines())
    found = json.loads(command("similar", run, image, "--topk", 3, "--json")[1])
    assert [{"image": str(image)} | row for row in predicted["examples"]] == found
    assert "examples" not in missing
    status, output, _ = command("predict", run, image, "--explain-by-example")
    assert status == 0
    assert found[0]["path"] in output
    assert "likeness: 1 is the same to both pretrained parents" in output
    status, _, errors = command("predict", run, image, "--explain-by-example", "--format", "csv")
    assert (status, "leave out --out and --format csv" in errors) == (2, True)
    assert command("evaluate", run)[0] == 0
    heading, *lines = (run / "predictions.csv").read_text().splitlines()
    path, label, _, score = lines[0].rsplit(",", 3)
    wrong = next(name for name in ("above", "below", "left") if name != label)
    (run / "predictions.csv").write_text("\n".join([heading, f"{path},{label},{wrong},{score}", *lines[1:]]))
    assert command("report", run)[0] == 0
    page = (run / "report.html").read_text()
    nearest = next(row for row in csv.DictReader((run / "nearest.csv").open()) if row["path"] == path)
    shown = page.partition('<div class="nearest">')[2].partition("</div>")[0]
    for rank in (1, 2, 3):
        assert f'title="{nearest[f"path_{rank}"]}: likeness {float(nearest[f"likeness_{rank}"]):.2f}"' in shown
    assert shown.count("data:image/png") == 3


def test_what_keeps_nothing_to_compare_by_has_no_similar_images(trained, digit, command):
    status, _, errors = command("similar", trained, digit)
    assert status == 2
    assert "which keeps nothing to compare images by; give a run of fuse(CNN,VIT,probe)" in errors


def test_it_is_exported(deepest, tmp_path, command):
    pytest.importorskip("onnx")
    status, _, errors = command("export", deepest, "--out", tmp_path / "out", "--format", "pt2")
    assert status == 0, errors


def go_on(run, recipe, listener):
    """Start a run, or resume it."""
    if run.exists():
        resume(run, QUIET, listener=listener)
    else:
        start(recipe, run, QUIET, listener=listener)


@pytest.mark.usefixtures("keep_all")
def test_interrupted_in_every_stage_and_resumed_it_ends_with_the_same_bits(deepest, photos, parent_files, tmp_path):
    run, own = tmp_path / "run", [shutil.copy(path, tmp_path) for path in parent_files]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenfusion.training.stages.judge_start", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # before the first checkpoint
            go_on(run, recipe_of(photos, tuple(own)), None)
    names = ["fusion on trial", "all on trial", "fusion", "all"]
    for stage in names:
        stop = interrupt_at(3)

        def listen(update, stage=stage, stop=stop):
            assert update.stage in names[: names.index(stage) + 1]
            if update.stage == stage:
                stop(update)

        with pytest.raises(Interrupted):
            go_on(run, recipe_of(photos, tuple(own)), listen)
        for path in own:
            Path(path).unlink(missing_ok=True)  # a run goes on without the files that it began with
    resume(run, QUIET)
    assert_same(deepest, run)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(run, recipe, cache, part):
    """Start a run or go on with it in a process of its own, which is killed in the middle of a part; "" to the end."""
    os.environ["TOKENFUSION_CACHE"] = str(cache)
    rising = count()
    stages.validate = lambda *_: (0.0, float(next(rising)))  # every stage is kept
    if part == "features":
        features.write_json = die  # a block is on the disk, and not noted
    elif part == "fit":
        stages.judge_start = die

    def listen(update):
        if update.stage == part and update.step == 3:
            die()

    go_on(run, recipe, listen)


def test_killed_in_every_stage_and_resumed_it_ends_with_the_same_bits(deepest, photos, parent_files, tmp_path):
    run, words = tmp_path / "run", (recipe_of(photos, parent_files), tmp_path / "cache")
    for part in ("features", "fit", "fusion on trial", "all on trial", "fusion", "all", ""):
        process = begin(train_and_die, run, *words, part)
        process.join()
        assert (part, process.exitcode) == (part, -signal.SIGKILL if part else 0)
    assert_same(deepest, run)


def test_what_is_no_better_on_the_images_set_aside_is_left_out(photos, parent_files, tmp_path, monkeypatch):
    run, said = tmp_path / "run", Console(record=True, width=200)
    monkeypatch.setattr("tokenfusion.training.stages.validate", lambda *_: (0.0, 0.5))
    start(recipe_of(photos, parent_files, epochs=1), run, said)
    text = said.export_text()
    assert "fusion on kept tokens is left out, for it is no better: 50.00% of the images set aside, 50.00%" in text
    assert "fine-tuning of all weights is left out" in text
    assert json.loads((run / "stages.json").read_text())["kept"] == []
    assert not Classifier.load(run).model.gate.weight.any()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    known = json.loads((run / "probe.json").read_text())["held_out"]
    assert [line["epoch"] for line in lines] == [0]
    assert lines[0]["val_top1"] == pytest.approx(known["mixture"])


def test_stages_are_tried_without_the_images_that_judge_them_nor_the_held_out_ones(
    photos, parent_files, tmp_path, monkeypatch
):
    seen = []

    def watch(setup, *rest):
        seen.append((setup.run.stage, set(setup.batches.images.names), set(setup.held_out.names)))
        return fit(setup, *rest)

    monkeypatch.setattr("tokenfusion.training.stages.fit", watch)
    start(recipe_of(photos, parent_files, epochs=1), tmp_path / "run", QUIET)
    split = choose_split(source := open_dataset(str(photos)), 0.2, 0)
    training, held_out = ({source.names[i] for i in part} for part in (split.train, split.val))
    for stage, learned, judged in seen:
        if stage.startswith("trial"):
            assert learned | judged == training
        else:
            assert (learned, judged) == (training, held_out)
        assert not learned & judged


def test_views_are_kept_and_each_is_augmented_anew(photos, parent_files, tmp_path):
    run = tmp_path / "run"
    start(recipe_of(photos, parent_files, tune="probe", views=3), run, QUIET)
    model = Classifier.load(run).model
    assert json.loads((run / "probe.json").read_text())["held_out"].keys() >= {"cnn", "vit", "both", "mean"}
    assert model.standardize.scale.any()


def test_the_command_takes_the_depth_that_fits_and_says_so_first(photos, parent_files, tmp_path, command):
    run = tmp_path / "run"
    words = ("train", photos, "--model", MODEL, "--pretrained", *parent_files, "--img-size", 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tokenfusion.training.auto.depth.image_seconds", None
        )  # no step is measured that cannot be chosen
        status, output, errors = command(*words, "--out", run)
    assert status == 0, errors
    assert output.index(f"loading the weights of {CNN} and {VIT}") < output.index("data: 42 images")
    assert "tune=auto takes probe: fewer than 100 training images cannot say whether more is better" in output
    assert output.index("tune=auto takes") < output.index("named right of the held-out images")
    times = json.loads((run / "times.json").read_text())
    assert times["seconds"].keys() == {"features", "fit", "judging"}
    assert "measuring" not in output  # for there is nothing to choose
    recipe = (run / "recipe.toml").read_text()
    assert recipe.startswith("# Chosen by measuring: tune.")
    assert 'tune = "probe"' in recipe
    status, output, errors = command(*words, "--dry-run", "--json")
    assert status == 0, errors
    assert json.loads(output)["seconds"].keys() == {"probe"}
    planned = json.loads(command(*words, "--tune", "all", "--dry-run", "--json")[1])
    assert planned["tune"] == "all"
    assert planned["seconds"]["probe"] < planned["seconds"]["fusion"] < planned["seconds"]["all"]


def test_a_dry_run_says_how_many_epochs_each_depth_trains_for(photos, parent_files, command, monkeypatch):
    words = ("train", photos, "--model", MODEL, "--pretrained", *parent_files, "--img-size", 64, "--dry-run")
    assert "fitted at once, without epochs" in command(*words, "--epochs", 3)[1]
    monkeypatch.setattr("tokenfusion.training.auto.depth.FEWEST", 10)
    rows = dict(re.findall(r"^(fusion|all) +about .* by (.*)$", command(*words)[1], re.MULTILINE))
    assert rows == {"fusion": f"{KEPT_TOKENS['epochs']} epochs", "all": f"{FINE_TUNING['epochs']} epochs"}
    for given, depths in (((), "fusion all"), (("--tune", "fusion"), "fusion")):
        output = command(*words, *given, "--epochs", 3)[1]
        rows = dict(re.findall(r"^(fusion|all) +about .* by (.*)$", output, re.MULTILINE))
        assert rows == dict.fromkeys(depths.split(), "3 epochs")


def test_what_is_too_long_even_at_the_least_is_not_measured(photos, parent_files, command, monkeypatch):
    monkeypatch.setattr("tokenfusion.training.auto.depth.FEWEST", 10)
    measured = []
    monkeypatch.setattr(
        "tokenfusion.training.auto.depth.image_seconds",
        lambda classifier, *_: measured.append(type(classifier).__name__) or 1e-9,
    )
    monkeypatch.setattr("tokenfusion.training.auto.depth.LEAST_STEP", 1e9)
    words = ("train", photos, "--model", MODEL, "--pretrained", *parent_files, "--img-size", 64, "--dry-run", "--json")
    planned = json.loads(command(*words)[1])
    assert measured == ["FeatureClassifier"]
    assert (planned["tune"], [*planned["seconds"]]) == ("fusion", ["probe", "fusion"])


def test_what_was_estimated_is_kept_beside_what_was_taken(photos, parent_files, tmp_path, command, monkeypatch):
    monkeypatch.setattr("tokenfusion.training.auto.depth.FEWEST", 10)
    words = ("train", photos, "--model", MODEL, "--pretrained", *parent_files, "--img-size", 64, "--tune-minutes", 0)
    status, output, errors = command(*words, "--out", tmp_path / "run")
    assert status == 0, errors
    assert "none fits into tune_minutes=0, and this is the least" in output
    times = json.loads((tmp_path / "run" / "times.json").read_text())
    assert times.keys() == {"estimated", "seconds"}
    taken, *_ = [line for line in output.splitlines() if line.startswith("took ")]
    assert taken.endswith("were estimated")
    assert all(f"{part} " in taken for part in times["seconds"])


def test_the_report_of_a_linear_classifier_draws_no_curves_and_says_what_took_how_long(
    photos, parent_files, tmp_path, command
):
    run = tmp_path / "run"
    start(recipe_of(photos, parent_files, tune="probe"), run, QUIET)
    record = json.loads((run / "metrics.jsonl").read_text())
    seconds = json.loads((run / "times.json").read_text())["seconds"]
    assert record["seconds"] == pytest.approx(seconds["features"] + seconds["fit"])
    assert command("evaluate", run)[0] == 0
    assert command("report", run)[0] == 0
    page = (run / "report.html").read_text()
    training = page.partition('<section id="training">')[2].partition("</section>")[0]
    assert "<svg" not in training
    assert "fitted at once, without epochs, so that there is no curve to draw" in training
    assert "both parents looking at the images" in page
    assert "images/s" not in page
    temperature = json.loads((run / "model.json").read_text())["temperature"]
    assert f"Temperature: <b>{temperature:.2f}</b>" in page


@pytest.mark.parametrize(
    ("minutes", "images", "depth"), [(10, 500, "all"), (5, 500, "fusion"), (0.1, 500, "probe"), (99, 50, "probe")]
)
def test_auto_takes_the_deepest_that_time_and_images_allow(minutes, images, depth):
    seconds: dict[Depth, float] = {"probe": 60.0, "fusion": 120.0, "all": 400.0}
    recipe = Recipe(model=MODEL, tune="auto", tune_minutes=minutes)
    assert deepest_within(recipe, seconds, images) == depth


def test_fields_that_nobody_gave_suit_the_depth_that_auto_takes():
    filled = preset(MODEL, "photos", pretrained=True)
    assert filled["tune"] == "auto"
    recipe = Recipe("photos", model=MODEL, **filled | {"lr": 7e-4})
    shallow, deep = at_depth(recipe, "fusion"), at_depth(recipe, "all")
    assert (shallow.lr, shallow.epochs, shallow.ema, shallow.mixup) == (7e-4, KEPT_TOKENS["epochs"], 0.0, 0.4)
    assert (deep.lr, deep.epochs, deep.ema) == (7e-4, FINE_TUNING["epochs"], FINE_TUNING["ema"])


def test_views_that_would_all_be_alike_are_refused(photos, parent_files, tmp_path):
    recipe = recipe_of(photos, parent_files, views=2, crop_scale=1.0, hflip=0.0)
    with pytest.raises(InputError, match="views=2 of an image are all the same; give a --crop-scale below 1"):
        start(recipe, tmp_path / "run", QUIET)


def test_images_smaller_than_a_patch_gray_ones_and_rare_classes_are_trained_on(parent_files, tmp_path):
    for label, name in enumerate(("above", "below")):
        for number in range(3):  # fewer than there are folds, and too few to set one aside
            photo(path := tmp_path / "photos" / name / f"{number}.png", label, number)
            Image.open(path).convert("L").resize((7, 5)).save(path)
    said = Console(record=True, width=200)
    recipe = recipe_of(tmp_path / "photos", parent_files, in_chans=1, epochs=1)
    start(recipe, tmp_path / "run", said)
    assert "penalty is cross-validated in 2 parts, not 5" in (said.export_text())
    model = Classifier.load(tmp_path / "run")
    assert model.preprocess.in_chans == 1
    assert model.predict(path)[0].label in ("above", "below")


def test_an_image_size_below_a_patch_is_refused_by_its_own_reason(parent_files, photos, tmp_path):
    with pytest.raises(InputError, match=rf"img_size=\(32, 8\) is smaller than a patch of {VIT}; give a larger"):
        start(recipe_of(photos, parent_files, img_size=(32, 8), tune="probe"), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


@torch.inference_mode()
def test_a_transformer_without_cls_is_read_by_its_patches():
    vit = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, class_token=False, global_pool="avg"
    )
    model = fuse(timm.create_model(CNN), vit, "probe", "add", num_classes=3, img_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    assert model.prefix == 0
    assert model.standardize.mean.shape == (model.channels[0] + model.channels[1],)
    torch.testing.assert_close(model.decide(model.keep(images)), model(images))


@torch.inference_mode()
def test_without_classes_it_gives_what_a_head_would_read():
    vit = timm.create_model(VIT, num_classes=0, img_size=32)
    model = fuse(timm.create_model(CNN), vit, "probe", "add", img_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    assert model.num_classes == 0
    assert torch.equal(model(images), model.forward_features(images))


def test_classes_that_were_renamed_meanwhile_are_refused(photos, parent_files, tmp_path):
    own, run = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "run"
    recipe = recipe_of(own, parent_files, tune="fusion")
    with pytest.raises(Interrupted):
        start(recipe, run, QUIET, listener=interrupt_at(1))
    (own / "left").rename(own / "right")
    split = (run / "split.csv").read_text()
    (run / "split.csv").write_text(split.replace("left", "right"))
    with pytest.raises(InputError, match=r"the classes.* are not those that the run began with"):
        resume(run, QUIET)


def test_fields_that_decide_are_compared_before_any_stage_goes_on(photos, parent_files, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        start(recipe_of(photos, parent_files, tune="fusion"), run, QUIET, listener=interrupt_at(1))
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("weight_decay = 0.05", "weight_decay = 0.5"))
    with pytest.raises(InputError, match=r"weight_decay=0\.5 \(it was 0\.05\)"):
        resume(run, QUIET)
