"""The dry run, and the recipes that it is for."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runs import small_recipe, tiny_recipe
from tokenfusion import InputError, Recipe, create_model
from tokenfusion.checkpoint import load_tensors
from tokenfusion.cli import app
from tokenfusion.models import list_models
from tokenfusion.options import data_first
from tokenfusion.recipe import load_recipe
from tokenfusion.training.auto.dry_run import plan, plan_table
from tokenfusion.training.schedule import MAX_EPOCHS

ROOT = Path(__file__).parents[3]
IMAGENET = sorted((ROOT / "recipes").glob("imagenet_*.toml"))


@pytest.fixture(scope="module")
def planned():
    said = []
    return plan(tiny_recipe(epochs=4), said.append)


def test_a_plan_counts_what_a_run_does_and_weighs_what_it_writes(planned, trained):
    """`trained` is the run of that recipe."""
    tensors, progress = load_tensors(trained / "state" / "last.safetensors")
    assert (planned.training_images, planned.held_out_images, planned.classes) == (1438, 359, 10)
    assert (planned.steps_per_epoch, planned.steps) == (11, progress["step"])
    assert planned.checkpoint_mb * 2**20 == pytest.approx(sum(tensor.nbytes for tensor in tensors.values()))


def test_a_plans_numbers_follow_from_each_other(planned):
    seconds = planned.step_seconds + 128 / planned.loading_images_per_s  # no workers: one after the other
    assert planned.images_per_s == pytest.approx(128 / seconds)
    assert planned.hours == pytest.approx(44 * seconds / 3600)
    assert planned.peak_memory_mb > planned.checkpoint_mb


def test_processes_share_the_batch_and_an_open_end_is_a_ceiling(monkeypatch):
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    planned = plan(tiny_recipe(epochs="auto", accumulate=2), print)
    assert (planned.processes, planned.batch_size, planned.epochs) == (4, 128, MAX_EPOCHS)
    lines = dict(plan_table(planned, epochs_auto=True))
    assert lines["batch"] == "128 images a step: 32 in each of 4 processes, in 2 parts"
    assert lines["steps"] == "11 an epoch, at most 300 epochs, 3,300 in all"


def test_a_plan_says_what_is_not_as_the_recipe_has_it():
    said = []
    planned = plan(tiny_recipe(batch_size=100_000, lr="auto"), said.append)
    assert said == [
        "each step takes all 1,438 training images, for batch_size=100000 is more than there are",
        "lr=auto is not tried in a dry run: its range test, of up to 100 steps, comes on top",
    ]
    assert (planned.batch_size, planned.steps_per_epoch) == (1438, 1)


@pytest.mark.parametrize(("hours", "words"), [(40 / 3600, "40 s"), (0.02, "1 min 12 s"), (3.2, "3 h 12 min")])
def test_a_plan_says_a_time_as_a_person_does(planned, hours, words):
    table = dict(plan_table(replace(planned, hours=hours, epochs=1), epochs_auto=False))
    assert f", {words} without evaluation" in table["training"]
    assert ", 1 epoch, " in table["steps"]


def test_the_command_prints_a_plan_and_writes_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("train", "digits", "--img-size", 8, "--dry-run")
    status, output, _ = command(*words, "--json")
    assert status == 0
    assert json.loads(output)["steps"] == 22 * 40  # of the preset
    assert list(tmp_path.iterdir()) == []
    status, _, errors = command("train", "digits", "--json", "--out", tmp_path / "run")
    assert (status, "give --dry-run with it" in errors) == (2, True)


def test_a_model_that_cannot_be_built_is_refused_by_name():
    with pytest.raises(InputError, match="nothing"):
        plan(small_recipe(model="nothing"), print)


def test_there_is_a_recipe_for_each_paper():
    papers = ("crossvit", "deepvit", "cmt", "tokenfusion")
    assert {path.name.split("_")[1] for path in IMAGENET} == set(papers)


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_a_recipe_for_imagenet_names_its_command_and_its_sources(path):
    recipe, text = Recipe(**load_recipe(path)), path.read_text()
    assert recipe.model in list_models()
    assert f"--recipe recipes/{path.name}" in text
    assert re.search(r"arXiv \d{4}\.\d{5}", text)
    assert "not trained here" in text or "not yet trained" in text
    assert recipe.batch_size % 8 == 0


ABLATIONS = ROOT / "recipes" / "cifar10_ablations.toml"


def test_the_ablations_name_their_commands_and_every_model_can_be_built():
    recipe, text = load_recipe(ABLATIONS), ABLATIONS.read_text()
    header = re.sub(r"\\\n#\s*", "", "".join(line for line in text.splitlines(True) if line.startswith("#")))
    commands = [shlex.split(line[2:]) for line in header.splitlines() if line.startswith("#   tokenfusion")]
    assert [words[words.index("--out") + 1] for words in commands] == [
        f"runs/ablation_{paper}" for paper in ("crossvit", "deepvit", "cmt")
    ]
    counted = []
    for words in commands:
        words[words.index(f"recipes/{ABLATIONS.name}")] = str(ABLATIONS)
        app.parse_args(data_first(words[1:]), exit_on_error=False, print_error=False)
        models = words[words.index("--models") + 1 :]
        counted.append(int(words[words.index("--seeds") + 1]) * len(models))
        shapes = set()
        for name in models:
            with torch.device("meta"):
                model = create_model(name, num_classes=10, img_size=32)
            learned = [parameter.requires_grad for parameter in model.parameters()]
            shapes.add(f"{model}{model.attention_layouts()}{learned}")
        assert len(shapes) == len(models)  # each differs from every other
    assert f"{counted[0]}, {counted[1]} and {counted[2]} runs" in text
    assert recipe["val_fraction"] == 0.1
