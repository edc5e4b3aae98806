"""Two trained runs as the parents of a fused one: it starts as they are, and goes on without them."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from runs import interrupt_at, small_recipe
from tokenfusion import Classifier, InputError, Recipe
from tokenfusion.checkpoint import load_tensors
from tokenfusion.data.decoded import read_images
from tokenfusion.data.loader import eval_batches
from tokenfusion.data.open import open_dataset
from tokenfusion.evaluate import collect_logits
from tokenfusion.models.adapters import OneWayCNN
from tokenfusion.training import Interrupted, build, resume, start
from tokenfusion.training.warm_start import warm_start

QUIET = Console(quiet=True)
DIGITS = tuple("0123456789")
CNN, VIT = "wide(resnet_micro,0.2)", "wide(vit_micro,0.2)"


def recipe_of(parents, model=f"fuse({CNN},{VIT})", **changes):
    runs = tuple(map(str, parents))
    return small_recipe(model=model, warm_start_from=runs, precision="fp32", drop_path=0.0, **changes)


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A CNN and a transformer that each saw the digits twice."""
    folder = tmp_path_factory.mktemp("parents")
    for name, model in (("cnn", CNN), ("vit", VIT)):
        start(small_recipe(model=model, precision="fp32", ema=0.0, batch_size=32), folder / name, QUIET)
    return folder / "cnn", folder / "vit"


@pytest.fixture(scope="module")
def digits():
    images, _ = read_images(open_dataset("digits"), range(40), max_pixels=64, cache_bytes=2**20)
    return images


def started(recipe, classes=DIGITS):
    """The fused classifier before its first step, and what was printed."""
    said = []
    classifier = build(recipe, classes)
    warm_start(classifier, recipe.warm_start_from, said.append)
    return classifier, said[0]


@pytest.mark.parametrize("cell", ["layerwise", "layerwise,cls", "late", "late,cross", "early,cross", "early,add"])
def test_before_the_first_step_it_computes_what_the_transformers_run_does(parents, digits, cell):
    fused, said = started(recipe_of(parents, f"fuse({CNN},{VIT},{cell})"))
    expected, labels = collect_logits(Classifier.load(parents[1]), digits)
    assert (expected.argmax(1) == labels).float().mean() > 0.3  # the run has learned something
    torch.testing.assert_close(collect_logits(fused, digits)[0], expected, rtol=0, atol=1e-6)
    assert said == f"starts from {parents[0]} and {parents[1]}"


def test_attention_that_is_not_gated_is_said_to_join_at_once(parents):
    _, said = started(recipe_of(parents, f"fuse({CNN},{VIT},early,joint)"))
    assert said.endswith("; not gated: pixels join the transformer's attention at once")


def test_its_cnn_computes_what_the_cnns_run_does(parents, digits):
    fused, _ = started(recipe_of(parents))
    alone = Classifier.load(parents[0])
    images = alone.to_input(next(eval_batches(digits, alone.preprocess, batch_size=40, workers=0))[0])
    with torch.no_grad():
        torch.testing.assert_close(fused.model.cnn.eval()(images), alone.model.forward_features(images))


def untrained_run(folder, name, **changes):
    """A run folder that looks trained: of random weights, statistics of BatchNorm included."""
    classifier = Classifier.create(name, DIGITS, device=torch.device("cpu"), precision="fp32", **changes)
    folder.mkdir()
    torch.manual_seed(len(name))
    with torch.no_grad():
        for key, tensor in classifier.model.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if key.endswith("var") else tensor.normal_(std=0.1)
    classifier.save(folder)
    return folder


@pytest.mark.parametrize("cnn", ["test_efficientnet", "test_resnet", "test_mambaout"])
@pytest.mark.parametrize("strategy", ["late", "layerwise"])
def test_timms_models_are_parents_too(tmp_path, cnn, strategy):
    parents = [untrained_run(tmp_path / name, name, img_size=(32, 48)) for name in (cnn, "test_vit")]
    recipe = replace(recipe_of(parents, f"fuse({cnn}, test_vit, {strategy})"), img_size=(32, 48))
    fused, _ = started(recipe)
    cnn_alone, alone = map(Classifier.load, parents)
    batch = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    torch.testing.assert_close(fused.logits(batch), alone.logits(batch), rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = cnn_alone.model.forward_intermediates(cnn_alone.to_input(batch), intermediates_only=True)[-1]
        torch.testing.assert_close(fused.model.eval().cnn(fused.to_input(batch)), expected, rtol=1e-3, atol=1e-4)
    assert isinstance(fused.model.cnn, OneWayCNN) == (cnn == "test_mambaout")


def test_for_other_classes_the_head_starts_at_random_and_that_is_said(parents):
    classes = ("zero", *DIGITS[1:])
    fused, said = started(recipe_of(parents), classes)
    assert f"the head starts at random, since the classes are not those of {parents[1]}" in said
    own, theirs = fused.model.vit.state_dict(), Classifier.load(parents[1]).model.state_dict()
    random = build(recipe_of(parents), classes).model.vit.state_dict()
    for name, tensor in own.items():
        assert torch.equal(tensor, (random if name.startswith("head") else theirs)[name]), name
    assert not torch.equal(own["head.weight"], theirs["head.weight"])


def test_it_resumes_without_its_parents(parents, tmp_path):
    copies = [shutil.copytree(parent, tmp_path / parent.name) for parent in parents]
    recipe = recipe_of(copies, backbone_lr=0.1, freeze="cnn")
    start(recipe, tmp_path / "whole", QUIET)
    with pytest.raises(Interrupted):
        start(recipe, tmp_path / "run", QUIET, listener=interrupt_at(5))
    for copy in copies:
        shutil.rmtree(copy)
    resume(tmp_path / "run", QUIET)
    whole, _ = load_tensors(tmp_path / "whole" / "model.safetensors")
    resumed, _ = load_tensors(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    trained_cnn = Classifier.load(parents[0]).model.cnn.state_dict()
    assert all(torch.equal(whole[f"cnn.{name}"], tensor) for name, tensor in trained_cnn.items())


def test_the_command_takes_two_folders(command, parents, tmp_path, monkeypatch):
    monkeypatch.chdir(parents[0].parent)
    few = ("--img-size", 8, "--epochs", 1, "--freeze", "both", "--out", tmp_path / "run")
    model, runs = f"fuse({CNN},{VIT})", ("cnn", "vit")
    status, output, errors = command("train", "digits", "--model", model, "--warm-start-from", *runs, *few)
    assert status == 0, errors
    assert f"starts from {parents[0]} and {parents[1]}\n" in output


@pytest.mark.parametrize(
    ("order", "changes", "said"),
    [
        (
            (1, 0),
            {},
            rf"vit is a run of {re.escape(VIT)}, but fuse\(.*\) has {re.escape(CNN)} in its place; give a run of",
        ),
        ((0, 1), {"model": f"fuse(resnet18,{VIT})"}, "has resnet18 in its place"),
        ((0, 1), {"model": "tokenfusion_late_micro"}, r"no model that starts from two .* --model fuse\(CNN,VIT\)"),
        ((0, 1), {"model": "vit(tokenfusion_late_micro)"}, "no model that starts from two runs"),
        ((0, 1), {"img_size": (8, 16)}, "8×8 pixels and 3 channels, but this run of 8×16 .*; give --img-size 8 8"),
        ((0, 1), {"in_chans": 1}, "this run of 8×8 pixels and 1 channels; .* --in-chans 3"),
    ],
)
def test_parents_that_do_not_fit_are_refused(parents, order, changes, said):
    with pytest.raises(InputError, match=said):
        started(replace(recipe_of([parents[i] for i in order]), **changes))


def test_parents_of_different_sizes_are_refused(parents, tmp_path):
    other = untrained_run(tmp_path / "vit", VIT, img_size=(8, 12))
    with pytest.raises(InputError, match=r"takes images of 8×8 pixels .* of 8×12 pixels .*; train both on the same"):
        started(recipe_of([parents[0], other]))


def test_grayscale_parents_that_are_normalised_differently_are_each_given_their_own(tmp_path):
    gray = {"img_size": (32, 32), "in_chans": 1}
    parents = [untrained_run(tmp_path / name, name, **gray) for name in ("test_resnet", "vit_micro")]
    model = started(replace(recipe_of(parents, "fuse(test_resnet,vit_micro)"), **gray))[0].model
    own, cnn = (Classifier.load(run).preprocess for run in reversed(parents))
    pixels = torch.rand(2, 1, 4, 4)
    expected = (pixels - cnn.mean[0]) / cnn.std[0]
    torch.testing.assert_close(model.cnn.rescale((pixels - own.mean[0]) / own.std[0]), expected)


def test_a_parent_must_be_finished(parents, tmp_path):
    unfinished = shutil.copytree(parents[1], tmp_path / "vit")
    (unfinished / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"is not finished: it has no weights yet; go on with"):
        started(recipe_of([parents[0], unfinished]))
    with pytest.raises(InputError, match="no such folder"):
        started(Recipe(**vars(recipe_of([tmp_path / "nowhere", parents[1]]))))


def test_parents_that_saw_the_held_out_images_are_refused(parents, tmp_path):
    with pytest.raises(
        InputError, match=r"was trained on [\d,]+ of the [\d,]+ images that this run holds out; give the"
    ):
        start(recipe_of(parents, seed=7), tmp_path / "run", QUIET)
