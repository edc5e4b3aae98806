"""No warning of a library reaches the user of a verb that measures, predicts, looks inside or reports."""

import json

import pytest
from torchvision.transforms.v2 import functional as F

from quiet import no_warning
from tokenfusion import Classifier
from tokenfusion.data.open import open_dataset
from tokenfusion.recipe import Recipe, dump_recipe

EPOCH = dict.fromkeys(("lr", "train_loss", "train_top1", "val_loss", "val_top1", "seconds", "images_per_s"), 0.5)


@pytest.fixture(params=["digits", "imagenette-160"])
def run_and_image(request, tmp_path):
    """A run on a few images, and one of these."""
    if request.param == "digits":
        return request.getfixturevalue("run"), request.getfixturevalue("digit")
    source = open_dataset(request.getfixturevalue("shared") / "data" / request.param)
    for index in range(6):
        folder = tmp_path / "data" / ("train", "val")[index % 2] / source.classes[source.labels[index // 2]]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{index}.jpg"
        F.to_pil_image(source.decode(index, 10**8)).save(path)
    run = tmp_path / "run"
    run.mkdir()
    data = str(tmp_path / "data")
    classifier = Classifier.create("tokenfusion_early_micro", open_dataset(data).classes, img_size=(32, 32))
    classifier.save(run)
    (run / "recipe.toml").write_text(dump_recipe(Recipe(data=data, model=classifier.name, img_size=(32, 32))))
    (run / "metrics.jsonl").write_text(json.dumps(EPOCH | {"epoch": 1}) + "\n")
    return run, path


def test_no_warning_of_a_library_reaches_the_user(command, run_and_image):
    run, image = run_and_image
    verbs = [
        ("evaluate", run),
        ("predict", run, image),
        ("explain", run, "--branch", "cnn", "--faithfulness", 2),
        ("explain", run, image, "--method", "rollout"),
        ("analyze", "tokens", run, "--num-images", 6),
        ("analyze", "collapse", run, "--num-images", 6),
        ("report", run),
    ]
    with no_warning():
        for words in verbs:
            status, _, errors = command(*words)
            assert (status, errors) == (0, ""), words
