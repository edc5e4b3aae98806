"""A loss of each side of a fusion model beside that of both: what is asked, how much it counts, what a run keeps."""

from math import log
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from runs import assert_same, interrupt_at, results, tiny_recipe
from tokenfusion import create_model
from tokenfusion.checkpoint import load_tensors
from tokenfusion.data.open import open_dataset
from tokenfusion.training import Interrupted, build, resume, start
from tokenfusion.training.objective import CrossEntropy, asked
from tokenfusion.training.schedule import last_epoch, side_weight
from tokenfusion.training.state import Progress
from tokenfusion.training.step import compute_gradients

QUIET = Console(quiet=True)
FUSED = [
    "tokenfusion_late_micro",
    "tokenfusion_early_micro",
    "tokenfusion_layerwise_micro",
    "fuse(resnet_micro,vit_micro,early,cross)",
]


def perturb(part):
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("name", FUSED)
def test_both_answer_as_the_model_does_and_the_patches_whatever_the_cnn_sees(name):
    torch.manual_seed(0)
    model, images = create_model(name, num_classes=5).eval(), torch.randn(4, 3, 32, 32)
    answers = model.side_logits(images)
    assert answers.shape == (3, 4, 5)
    assert torch.equal(answers[0], model(images))
    perturb(model.cnn)
    both, patches, pixels = model.side_logits(images)
    assert torch.equal(patches, answers[1])
    assert not torch.allclose(both, answers[0])
    assert not torch.allclose(pixels, answers[2])


@pytest.mark.parametrize("name", ["tokenfusion_layerwise_micro", "fuse(resnet_micro,vit_micro,early,cross)"])
def test_the_pixels_answer_whatever_the_patches_show_unless_they_met(name):
    """In joint attention they do."""
    torch.manual_seed(0)
    model, images = create_model(name, num_classes=5).eval(), torch.randn(4, 3, 32, 32)
    model.set_gates(0.0)  # nothing is written back into the CNN's maps
    before = model.side_logits(images)
    perturb(model.vit.embed.patches)
    both, patches, pixels = model.side_logits(images)
    assert torch.equal(pixels, before[2])
    assert not torch.allclose(both, before[0])
    assert not torch.allclose(patches, before[1])


def test_with_closed_gates_both_are_the_patches_alone():
    model, images = create_model("tokenfusion_layerwise_micro").eval(), torch.randn(4, 3, 32, 32)
    model.set_gates(0.0)
    both, patches, _ = model.side_logits(images)
    torch.testing.assert_close(both, patches)


class Answers(nn.Module):
    """Logits that are weights, so that their gradients are the slopes of the loss."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3, 1, 2))

    def forward(self, images):
        return self.logits.expand(3, len(images), 2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_side_counts_half_of_a_weight_that_falls_with_the_steps(accumulate):
    """After 5 of 20 steps 0.8 is 0.6: of two equal logits the slope is -1/2, and -0.3 · 1/2 of either side's."""
    network, recipe = Answers(), tiny_recipe(side_loss=0.8, epochs=2, accumulate=accumulate, precision="fp32")
    setup = SimpleNamespace(
        recipe=recipe,
        batches=SimpleNamespace(steps_per_epoch=10),
        classifier=SimpleNamespace(device=torch.device("cpu")),
        loss=CrossEntropy(0.0),
    )
    state = SimpleNamespace(network=network, progress=Progress(step=5))
    loss, _ = compute_gradients(setup, state, torch.zeros(4, 1, 1, 1), torch.tensor([[1.0, 0.0]] * 4))
    assert loss.item() == pytest.approx(log(2))  # that of both alone is told
    expected = torch.tensor([[-0.5, 0.5], [-0.15, 0.15], [-0.15, 0.15]])
    torch.testing.assert_close(network.logits.grad[:, 0], expected)


def test_the_weight_falls_along_a_line_to_nothing():
    recipe = tiny_recipe(side_loss=2.0, epochs=4)
    assert [side_weight(recipe, step, 5) for step in (0, 5, 10, 20)] == [2.0, 1.5, 1.0, 0.0]
    assert side_weight(tiny_recipe(), 3, 5) == 0
    endless = tiny_recipe(side_loss=2.0, epochs="auto")
    assert side_weight(endless, 1000, 5) == 2.0
    start, end = 10 * 5, last_epoch(10) * 5
    assert [side_weight(endless, step, 5, 10) for step in (start, (start + end) // 2, end)] == [2.0, 1.0, 0.0]


def test_without_it_the_model_itself_is_asked():
    model = build(tiny_recipe(), ("a", "b")).model
    assert asked(model, tiny_recipe()) is model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    start(RECIPE, run, QUIET)
    return run


RECIPE = tiny_recipe(side_loss=1.0, branch_dropout=0.2)


def test_a_run_that_was_interrupted_ends_with_the_same_bits(whole, tmp_path):
    with pytest.raises(Interrupted):
        start(RECIPE, tmp_path / "run", QUIET, listener=interrupt_at(5))
    resume(tmp_path / "run", QUIET)
    assert_same(tmp_path / "run", whole)


def test_a_run_ships_the_tensors_of_one_without_and_others_values(whole, tmp_path):
    start(tiny_recipe(branch_dropout=0.2), tmp_path / "run", QUIET)
    tensors, plain = (results(run)[0] for run in (whole, tmp_path / "run"))
    assert tensors.keys() == plain.keys()
    assert not torch.equal(tensors["model.vit.blocks.0.attn.qkv.weight"], plain["model.vit.blocks.0.attn.qkv.weight"])
    shipped, _ = load_tensors(whole / "model.safetensors")
    assert shipped.keys() == build(RECIPE, open_dataset("digits").classes).model.state_dict().keys()
