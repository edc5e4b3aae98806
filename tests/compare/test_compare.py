"""Real comparisons of micro models on digits: kept, killed, failed and refused runs, and what the files say of them."""

import csv
import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from children import begin_command, fork_runs
from runs import small_recipe
from tokenfusion.checkpoint import load_tensors
from tokenfusion.classifier import Classifier
from tokenfusion.compare import Budget, compare, plan_comparison, summarise
from tokenfusion.compare.contenders import Contender, slug
from tokenfusion.compare.results import is_finished, sides_of_model, sides_of_run
from tokenfusion.compare.results import test_against_first as against_first
from tokenfusion.compare.statistics import pareto_front
from tokenfusion.compare.table import comparison_table
from tokenfusion.compare.timing import minutes_of_epochs
from tokenfusion.data.open import open_dataset
from tokenfusion.errors import InputError
from tokenfusion.recipe import load_recipe

# which learn something in an epoch
CNN, VIT = MODELS = ["wide(resnet_micro,0.5)", "wide(with(vit_micro,depth=2),0.5)"]
MEAN = f"mean({CNN},{VIT})"
RECIPE = small_recipe(epochs=1, drop_path=0.0)
OPTIONS = ("digits", "--img-size", 8, "--batch-size", 128, "--lr", 4e-3, "--ema", 0.9)
TIMES = {"minutes", "images_per_s", "peak_memory_mb"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Bits depend on the number of threads, and that on `--jobs` and the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        fork_runs(patch)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A comparison that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    compare(RECIPE, [*MODELS, MEAN], 2, out, jobs=2)
    return out


@pytest.fixture
def out(whole, tmp_path):
    """A finished comparison that may be written into."""
    return shutil.copytree(whole, tmp_path / "out")


def test_all_runs_leave_out_the_same_images(tmp_path):
    """Those of the list as it was when the comparison began."""
    given, out = tmp_path / "list.csv", tmp_path / "out"
    names = open_dataset("digits").names
    given.write_text(f"path\n{names[5]}\n")
    recipe = replace(RECIPE, exclude=str(given))
    compare(recipe, MODELS[1:], 1, out)
    given.write_text(f"path\n{names[6]}\n")
    with pytest.raises(InputError, match=r"list.csv differs from .*excluded.csv, by which the comparison began"):
        compare(recipe, MODELS, 1, out)
    given.unlink()
    assert compare(recipe, MODELS[1:], 1, out)["training_images"] == 1437
    assert load_recipe(out / "recipe.toml")["exclude"] == str(out / "excluded.csv")  # what every run trains by
    kept = [path.read_text() for path in (out / "excluded.csv", out / "runs" / f"{slug(VIT)}-seed0" / "excluded.csv")]
    assert kept == [f"path\n{names[5]}\n"] * 2


def read(out: Path):
    return json.loads((out / "comparison.json").read_text())


def without_times(value):
    """What does not depend on the machine's pace."""
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key not in TIMES}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def test_the_json_says_what_the_run_folders_say(whole):
    result = read(whole)
    assert [row["name"] for row in result["models"]] == [*MODELS, MEAN]
    for row in result["models"]:
        assert row["failed"] == []
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        for run in row["runs"]:
            evaluation = json.loads((whole / run["run"] / "evaluation.json").read_text())
            assert (run["top1"], run["loss"], run["n"]) == (evaluation["top1"], evaluation["loss"], evaluation["n"])
        one, other = (run["top1"] for run in row["runs"])
        mean, half = (one + other) / 2, 12.7062 * abs(one - other) / 2  # t of one degree of freedom
        assert row["top1_mean"] == pytest.approx(mean)
        assert row["top1_ci95"] == pytest.approx([max(mean - half, 0), min(mean + half, 1)], abs=1e-5)
        assert row["top1_ci95_images"] is None
    cnn, vit, mean = result["models"]
    for quantity in ("parameters", "macs", "minutes"):
        assert mean[quantity] == pytest.approx(cnn[quantity] + vit[quantity])
    differences = [a["top1"] - b["top1"] for a, b in zip(vit["runs"], cnn["runs"], strict=True)]
    assert [test["name"] for test in result["tests"]] == [*MODELS[1:], MEAN]
    assert result["tests"][0]["difference_mean"] == pytest.approx(fmean(differences))
    assert result["tests"][0]["method"] == "paired t over 2 seeds"  # each seed holds out its own
    assert (result["budget"], result["seeds"], result["training_images"]) == ("epochs=1", [0, 1], 1438)


def test_seeds_of_one_test_set_are_crossed_with_its_images(tmp_path):
    for name, wrong in {"a-0": 1, "a-1": 3, "b-0": 5, "b-1": 5}.items():
        (tmp_path / name).mkdir()
        rows = [f"{image}.png,cat,{'dog' if image < wrong else 'cat'},0.9\n" for image in range(20)]
        (tmp_path / name / "predictions.csv").write_text("path,label,prediction,score\n" + "".join(rows))
    runs = {"a": {0: {"top1": 0.95}, 1: {"top1": 0.85}}, "b": {0: {"top1": 0.75}, 1: {"top1": 0.75}}}
    comparison = SimpleNamespace(
        contenders=[Contender("b", "model")], run=lambda name, seed: tmp_path / f"{name}-{seed}"
    )
    test = against_first(comparison, "a", runs)
    assert test["method"] == "t over 2 and 2 seeds (Welch), images 20 random too"
    assert test["difference_mean"] == pytest.approx(0.15)


def test_what_each_side_is_worth_is_what_tokens_json_says(tmp_path):
    for seed, lost in enumerate((0.1, 0.3)):
        change = {"mean": -lost, "ci95": [-lost - 0.05, -lost + 0.05]}
        row = {"layer": "whole branch", "tokens": "patch", "top1_change": change}
        folder = tmp_path / str(seed) / "tokens"
        folder.mkdir(parents=True)
        (folder / "tokens.json").write_text(json.dumps({"replaced": [row | {"layer": "blocks.0"}, row]}))
    one, two = ({"sides": sides_of_run(tmp_path / str(seed))} for seed in (0, 1))
    assert one["sides"] == [{"tokens": "patch", "lost": 0.1, "ci95": pytest.approx([0.05, 0.15])}]
    assert sides_of_model([one])[0]["ci95"] == pytest.approx([0.05, 0.15])
    [both] = sides_of_model([one, two])
    assert (both["lost"], both["seeds"]) == (pytest.approx(0.2), 2)
    assert both["ci95"] == pytest.approx([0.2 - 12.7062 * 0.1, 0.2 + 12.7062 * 0.1], abs=1e-4)
    assert sides_of_model([{"sides": sides_of_run(tmp_path / "none")}]) == []


def test_no_warning_of_a_library_is_in_a_runs_log(whole):
    logs = [path.read_text() for path in (whole / "logs").iterdir()]
    assert len(logs) == 4
    assert not any("Warning" in log for log in logs)


def test_the_mean_is_that_of_the_members_probabilities(whole):
    classifiers = [Classifier.load(whole / "runs" / f"{slug(name)}-seed1") for name in MODELS]
    with (whole / "runs" / f"{slug(MEAN)}-seed1" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    source = open_dataset("digits")
    images = [source.decode(int(row["path"].removeprefix("digits:")), 10**6) for row in rows]
    batch = torch.stack([classifiers[0].preprocess.resize(image) for image in images])
    probabilities = sum(classifier.logits(batch).softmax(1) for classifier in classifiers) / 2
    scores, classes = probabilities.max(1)
    assert [int(row["prediction"]) for row in rows] == classes.tolist()
    assert [float(row["score"]) for row in rows] == pytest.approx(scores.tolist(), abs=1e-5)


def test_one_seed_is_tested_on_its_images(out):
    result = compare(RECIPE, [*MODELS, MEAN], 1, out)  # all of it is there already
    vit = result["models"][1]
    assert (vit["top1_sd"], vit["top1_ci95"]) == (None, None)
    low, high = vit["top1_ci95_images"]
    assert low < vit["top1_mean"] < high
    right = [
        [row["label"] == row["prediction"] for row in csv.DictReader(path.open(newline=""))]
        for path in (out / "runs" / f"{slug(name)}-seed0" / "predictions.csv" for name in MODELS)
    ]
    assert result["tests"][0]["method"].startswith("exact McNemar")
    assert result["tests"][0]["difference_mean"] == pytest.approx(fmean(right[1]) - fmean(right[0]))


def test_killed_and_run_again_it_equals_one_that_was_not(whole, tmp_path, command):
    out = tmp_path / "out"
    words = ["compare", *OPTIONS, "--models", ",".join([*MODELS, MEAN]), "--seeds", 1, "--budget", "epochs=1"]
    words = [*map(str, words), "--crop-scale", "0.6", "--warmup-epochs", "1", "--out", str(out)]
    process = begin_command(tmp_path / "said.txt", *words)
    while not (out / "runs" / f"{slug(VIT)}-seed0" / "recipe.toml").exists():  # the second run has begun
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    assert "Warning" not in (out / "logs" / f"{slug(CNN)}-seed0.txt").read_text()  # of an interpreter of its own
    first = out / "runs" / f"{slug(CNN)}-seed0" / "model.safetensors"
    written = first.stat().st_mtime_ns
    status, output, _ = command(*words)
    assert status == 0
    assert first.stat().st_mtime_ns == written  # kept
    assert CNN in output
    assert f"{MEAN}</bdi>" in (out / "report.html").read_text()
    for row, expected in zip(read(out)["models"], read(whole)["models"], strict=True):
        assert without_times(row["runs"]) == without_times(expected["runs"][:1])
    for name in MODELS:
        tensors, _ = load_tensors(out / "runs" / f"{slug(name)}-seed0" / "model.safetensors")
        uninterrupted, _ = load_tensors(whole / "runs" / f"{slug(name)}-seed0" / "model.safetensors")
        assert all(torch.equal(tensor, uninterrupted[key]) for key, tensor in tensors.items())


def test_ctrl_c_saves_the_run_under_way(tmp_path):
    out = tmp_path / "out"
    words = ["compare", *OPTIONS, "--models", VIT, "--seeds", 1, "--epochs", 500, "--out", out]
    process = begin_command(said := tmp_path / "said.txt", *words)
    run = out / "runs" / f"{slug(VIT)}-seed0"
    while not (run / "metrics.jsonl").exists():  # an epoch is done
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert "the same command goes on" in said.read_text()
    log = (out / "logs" / f"{slug(VIT)}-seed0.txt").read_text()  # of an interpreter of its own
    assert "stopped and saved" in log
    assert "Warning" not in log


@pytest.mark.parametrize("unit", ["epochs", "minutes"])
def test_a_model_that_fails_leaves_the_others_going(tmp_path, command, unit):
    """One image at a time, whose last map has one pixel, gives BatchNorm no variance; a transformer has none."""
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), 60 * i, np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    models = ("--models", "resnet18", VIT, f"mean(resnet18,{VIT})")
    words = ("compare", tmp_path / "data", *models, "--img-size", 8, "--batch-size", 1, "--seeds", 1)
    amount = 1.0
    if unit == "minutes":  # what an epoch takes here is known once it was refused
        _, _, errors = command(*words, "--budget", "minutes=1e-9", "--out", tmp_path / "out")
        assert f"less than one epoch of {VIT}" in errors
        amount = 1.5 * json.loads((tmp_path / "out" / "timing.json").read_text())[VIT]["minutes"]
    status, output, _ = command(*words, "--budget", f"{unit}={amount:g}", "--out", tmp_path / "out")
    assert status == 1
    cnn, vit, mean = read(tmp_path / "out")["models"]
    assert cnn["runs"] == mean["runs"] == []
    assert "BatchNorm sees a single value" in cnn["failed"][0]["reason"]
    assert mean["failed"] == [{"seed": 0, "reason": "resnet18 failed"}]
    assert len(vit["runs"]) == 1
    assert "resnet18 seed 0 failed: BatchNorm" in output


def test_a_run_that_lacks_its_predictions_or_was_evaluated_on_other_images_is_evaluated_anew(whole, out, command):
    (out / "runs" / f"{slug(VIT)}-seed1" / "predictions.csv").unlink()
    run = out / "runs" / f"{slug(CNN)}-seed0"
    assert command("evaluate", run, "--split", "train", "--out", run)[0] == 0
    compare(RECIPE, [*MODELS, MEAN], 2, out, jobs=2)
    assert without_times(read(out)) == without_times(read(whole))


def test_damaged_results_are_no_finished_run_and_a_damaged_log_is_refused(out):
    comparison = plan_comparison(RECIPE, MODELS, 2, out, Budget("epochs", 1))
    vit = comparison.contenders[1]
    assert is_finished(comparison, vit, 1)
    (out / "runs" / f"{slug(VIT)}-seed1" / "evaluation.json").write_text("{}")
    assert not is_finished(comparison, vit, 1)
    metrics = out / "runs" / f"{slug(VIT)}-seed0" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:20])
    with pytest.raises(
        InputError, match=rf"{re.escape(slug(VIT))}-seed0/metrics\.jsonl line 1 is not JSON .*, or train again"
    ):
        summarise(comparison, {})


def test_a_model_that_lacks_a_seed_is_compared_by_the_seeds_that_it_has(out):
    (out / "runs" / f"{slug(VIT)}-seed1" / "model.safetensors").unlink()
    result = summarise(plan_comparison(RECIPE, MODELS, 2, out, Budget("epochs", 1), jobs=2), {})
    cnn, vit = result["models"]
    assert (len(cnn["runs"]), len(vit["runs"])) == (2, 1)
    assert 0 <= cnn["top1_ci95"][0] < cnn["top1_ci95"][1] <= 1  # two seeds: far wider than 0 to 1 by Student's t
    points = {row["name"]: (row["macs"], row["top1_mean"]) for row in result["models"]}
    assert result["pareto"] == pareto_front(points)
    assert VIT in result["pareto"]  # it costs the least
    (line,) = (line for line in comparison_table(result) if line[0] == VIT)
    assert line[3].endswith(" (1 seed)")


def test_a_run_folder_of_another_recipe_is_refused(out):
    before = read(out)
    for recipe, said in (
        (replace(RECIPE, lr=0.005), r"lr=0\.004 instead of 0\.005"),
        (replace(RECIPE, epochs=2), "ep"),
    ):
        with pytest.raises(InputError, match=f"run folder of another recipe .*{said}"):
            compare(recipe, MODELS, 2, out)
    assert read(out) == before
    compare(replace(RECIPE, workers=1), MODELS, 2, out)  # decides nothing: the runs are kept


def test_runs_on_other_images_are_refused(out):
    path = out / "runs" / f"{slug(VIT)}-seed1" / "predictions.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=f"{re.escape(slug(VIT))}-seed1 was evaluated on other images"):
        compare(RECIPE, MODELS, 2, out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--models", "resnet_micro,vit_mikro"], "did you mean vit_micro"),
        (["--models", "fuse(a,b"], "do not match"),
        (["--models", "fuse(resnet_micro,vit_mikro,late)", "--controls"], "did you mean vit_micro"),
        (["--models", "fuse(resnet_micro,vit_micro,early,cls)", "--controls"], "at the entrance CLS is the same"),
        (["--models", "vit_micro", "--budget", "macs=1e3"], "the smallest that works is macs="),
        (["--models", "vit_micro", "--budget", "epochs=2.5"], "try epochs=3"),
        (["--models", "vit_micro", "--budget", "epochs=2", "--epochs", 3], "differ"),
        (["--models", "vit_micro", "--model", "resnet_micro"], "--models A,B"),
        (["--models", "vit_micro", "--seeds", 0], "seeds=0"),
        (["--models", "vit_micro", "--jobs", 0], "jobs=0"),
        (["--models", "vit_micro", "--out", "taken"], "no folder of a comparison"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(command, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("dear")
    out = [] if "--out" in options else ["--out", "out"]
    status, _, errors = command("compare", *OPTIONS, *options, *out)
    assert status == 2
    assert errors.startswith("error: ")
    assert said in errors
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]


def test_the_readmes_command_is_understood(command, tmp_path):
    """All but its training: a budget that is too small is refused when everything else is settled."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (line,) = (line for line in readme.splitlines() if line.startswith("$ tokenfusion compare"))
    words = line.replace("epochs=2", "macs=1").replace("runs/compare", str(tmp_path / "out")).split()
    status, _, errors = command(*words[2:])
    assert status == 2
    assert "budget macs=1 is less than one epoch of tokenfusion_early_micro" in errors


def test_steps_are_timed_once_and_too_few_minutes_are_refused(tmp_path):
    with pytest.raises(
        InputError, match=f"less than one epoch of {re.escape(VIT)}; the smallest that works is minutes="
    ):
        compare(RECIPE, [VIT], 1, tmp_path, budget=Budget("minutes", 1e-9))
    assert not list((tmp_path / "runs").iterdir())
    kept = json.loads((tmp_path / "timing.json").read_text())[VIT]["minutes"]
    again = minutes_of_epochs([Contender(VIT, "model")], RECIPE, 1, tmp_path / "timing.json")
    assert again == ({VIT: kept}, {})


def test_a_folder_of_runs_is_no_comparison(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project" / "runs").mkdir(parents=True)
    (tmp_path / "project" / "recipe.toml").write_text("mine = 1")
    status, _, errors = command("compare", *OPTIONS, "--models", "vit_micro", "--out", "project")
    assert status == 2
    assert "no folder of a comparison" in errors
    assert (tmp_path / "project" / "recipe.toml").read_text() == "mine = 1"
