"""Schedule, parameter groups, seeds and mixing, against hand-computed cases."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

from runs import small_recipe
from tokenfusion import Recipe, create_model
from tokenfusion.training import muon
from tokenfusion.training.objective import BatchMixing
from tokenfusion.training.optimizer import lr_scales, make_optimizer, seed_step
from tokenfusion.training.schedule import learning_rate
from tokenfusion.training.step import learn


def test_learning_rate_rises_linearly_then_falls_along_a_cosine():
    recipe = small_recipe(lr=1.0, epochs=10, warmup_epochs=2.0)
    rates = [learning_rate(recipe, step, steps_per_epoch=4) for step in range(40)]
    assert rates[:8] == pytest.approx([(step + 1) / 9 for step in range(8)])
    assert rates[8] == 1.0  # the peak, right after the warm-up
    assert rates[24] == pytest.approx(0.5)  # half-way down: (24 - 8) / (40 - 8)
    assert 0 < rates[39] < 0.003
    assert all(later < earlier for earlier, later in pairwise(rates[8:]))


def test_the_cosine_ends_at_the_smallest_rate():
    recipe = small_recipe(lr=1.0, min_lr=0.2, epochs=10, warmup_epochs=2.0)
    rates = [learning_rate(recipe, step, steps_per_epoch=4) for step in range(40)]
    assert rates[8] == 1.0
    assert rates[24] == pytest.approx(0.6)  # half-way between the peak and the end
    assert rates[39] == pytest.approx(0.2, abs=0.003)
    assert rates[:8] == pytest.approx([(step + 1) / 9 for step in range(8)])
    openly = small_recipe(lr=1.0, min_lr=0.2, epochs="auto")
    assert learning_rate(openly, 48 - 1, 4, decay_epoch=10) == pytest.approx(0.2 + 0.8 * (1 - (7 / 8) ** 0.5))


def test_without_warm_up_the_first_step_is_the_peak():
    assert learning_rate(small_recipe(lr=0.3, warmup_epochs=0.0), 0, 5) == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_decay_falls_on_matrices_and_kernels_alone(name):
    model = create_model("tokenfusion_layerwise_micro")
    optimizer = make_optimizer(model, small_recipe(weight_decay=0.3, optimizer=name))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert decayed | free == set(names.values())
    assert not decayed & free
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    vit = ("vit.embed.cls_token", "vit.embed.positions.table", "vit.norm.weight", "vit.head.bias")
    for name in (*vit, "exchanges.0.gate.weight", "exchanges.0.write.gate.weight", "exchanges.0.source.source"):
        assert name in free


@pytest.mark.parametrize("name", ["tokenfusion_late_micro", "crossvit_micro", "resnet_micro"])
def test_at_one_rate_there_are_two_groups_in_the_models_order(name):
    """By which checkpoints number what they hold."""
    model = create_model(name)
    exempt = model.no_weight_decay()
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim > 1 and name not in exempt]
    others = [p for name, p in named if p.ndim <= 1 or name in exempt]
    groups = make_optimizer(model, small_recipe()).param_groups
    assert [[id(p) for p in group["params"]] for group in groups] == [[*map(id, matrices)], [*map(id, others)]]
    assert [group["lr_scale"] for group in groups] == [1.0, 1.0]


HEAD = {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("name", "fast", "usual"),
    [
        ("fuse(test_resnet,test_vit)", {"vit.model.head.weight", "vit.model.head.bias"}, ("exchanges", "readout")),
        ("vit_micro", HEAD, "nothing"),
        ("test_efficientnet", {"classifier.weight", "classifier.bias"}, "nothing"),
        ("deit_tiny_distilled_patch16_224", {*HEAD, "head_dist.weight", "head_dist.bias"}, "nothing"),
    ],
)
def test_backbone_and_head_have_rates_of_their_own_and_what_fuses_has_the_usual_one(name, fast, usual):
    model = create_model(name)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {
        names[parameter]: group["lr_scale"]
        for group in make_optimizer(model, small_recipe(backbone_lr=0.1, head_lr=10.0)).param_groups
        for parameter in group["params"]
    }
    assert rates.keys() == set(names.values())
    assert {name for name, rate in rates.items() if rate == 10.0} == fast
    assert {name for name, rate in rates.items() if rate == 1.0} == {name for name in rates if name.startswith(usual)}
    assert set(rates.values()) <= {0.1, 1.0, 10.0}


@pytest.mark.parametrize(("frozen", "rest"), [("cnn", {"vit", "fusion", "head"}), ("vit", {"cnn", "fusion", "head"})])
def test_frozen_weights_are_left_out(frozen, rest):
    model = create_model("tokenfusion_layerwise_micro").freeze(frozen)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, small_recipe()).param_groups
    assert {model.part_of(names[parameter]) for group in groups for parameter in group["params"]} == rest


def test_muon_turns_a_matrix_by_an_orthogonal_step_as_long_as_adamws_and_leaves_vectors_to_adamw():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4)
    recipe = small_recipe(weight_decay=0.0, lr=0.01)
    optimizer = make_optimizer(model, recipe)
    before = {key: value.clone() for key, value in model.named_parameters()}
    model(torch.randn(32, 6)).square().sum().backward()
    optimizer.step()
    step = (model.weight - before["weight"]).detach() / recipe.lr
    singular = torch.linalg.svdvals(step)
    assert singular.max() / singular.min() < 2.5  # five Newton-Schulz steps bring them near each other
    assert 0.1 < step.square().mean().sqrt() < 0.4  # AdamW's usual root mean square, 0.2 by Moonlight's rule
    assert "exp_avg" in optimizer.state[model.bias]
    assert "exp_avg" not in optimizer.state[model.weight]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_muon_gives_timms_numbers_in_the_precision_that_the_hardware_has(kind, monkeypatch):
    iterate = timm.optim.muon.zeropower_via_newtonschulz
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", partial(iterate, dtype=kind))
    monkeypatch.setattr(muon, "has_bf16", lambda _: kind == torch.bfloat16)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 5, 1))
    twin = copy.deepcopy(model.to(memory_format=torch.channels_last))
    ours = make_optimizer(model, small_recipe(weight_decay=0.3))
    groups = [
        {"weight_decay": 0.3, "params": [p for p in twin.parameters() if p.ndim > 1]},
        {"weight_decay": 0.0, "params": [p for p in twin.parameters() if p.ndim == 1], "use_fallback": True},
    ]
    theirs = timm.optim.Muon(groups, lr=4e-3, nesterov=True)
    for _ in range(3):
        images = torch.randn(4, 3, 6, 6)
        for each, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            each(images).square().sum().backward()
            optimizer.step()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7, msg=name)
        kept = {key: value for key, value in theirs.state[other].items() if key != "use_muon"}
        assert ours.state[parameter].keys() == kept.keys()  # by which checkpoints name them


def test_a_step_draws_the_same_whatever_came_before():
    seed_step(3, 7)
    first = torch.rand(4)
    torch.rand(100)
    seed_step(3, 7)
    assert torch.equal(torch.rand(4), first)
    for seed, step in ((3, 8), (4, 7), (7, 3)):
        seed_step(seed, step)
        assert not torch.equal(torch.rand(4), first)


def test_no_mixing_gives_one_hot_targets():
    images, targets = BatchMixing(small_recipe(), 3)(torch.ones(2, 3, 4, 4), torch.tensor([2, 0]))
    assert targets.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert torch.equal(images, torch.ones(2, 3, 4, 4))


def test_mixup_mixes_pixels_as_it_mixes_targets():
    torch.manual_seed(0)
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    mixed, targets = BatchMixing(small_recipe(mixup=1.0), 2)(images, torch.tensor([0, 1]))
    assert 0 < targets[0, 1] < 1
    torch.testing.assert_close(mixed[:, 0, 0, 0], targets[:, 1])  # the share of ones is the share of class 1


def test_cutmix_pastes_an_area_as_large_as_its_share_of_the_target():
    torch.manual_seed(1)
    images = torch.stack([torch.zeros(3, 20, 20), torch.ones(3, 20, 20)])
    mixed, targets = BatchMixing(small_recipe(cutmix=1.0), 2)(images, torch.tensor([0, 1]))
    assert set(mixed.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets[:, 1])


def test_with_both_each_batch_draws_one():
    mixing = BatchMixing(small_recipe(mixup=1.0, cutmix=1.0), 2)
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    kinds = set()
    for step in range(20):
        seed_step(0, step)
        mixed, targets = mixing(images, torch.tensor([0, 1]))
        if 0 < targets[0, 1] < 1:
            kinds.add("cutmix" if set(mixed.unique().tolist()) <= {0.0, 1.0} else "mixup")
    assert kinds == {"mixup", "cutmix"}


def test_a_share_of_the_batches_is_mixed():
    mixing = BatchMixing(small_recipe(mixup=1.0, mix_prob=0.25), 2)
    images, labels = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), torch.tensor([0, 1])
    untouched = 0
    for step in range(400):
        seed_step(0, step)
        mixed, targets = mixing(images, labels)
        untouched += torch.equal(mixed, images) and torch.equal(targets, torch.eye(2))
    assert 300 - 30 < untouched < 300 + 30  # more than three standard deviations


def test_a_layer_learns_the_more_slowly_the_more_layers_are_behind_it():
    recipe = Recipe(backbone_lr=0.5, layer_decay=0.7)
    plain = lr_scales(timm.create_model("test_vit"), recipe)
    assert plain["head.weight"] == 1.0
    blocks = [plain[f"blocks.{i}.attn.qkv.weight"] for i in range(6)]
    assert all(b == pytest.approx(a / 0.7) for a, b in pairwise(blocks))
    assert plain["patch_embed.proj.weight"] < blocks[0]
    fused = lr_scales(create_model("fuse(test_efficientnet,test_vit,probe)", num_classes=3, img_size=32), recipe)
    assert fused["votes.weight"] == fused["head.weight"] == 1.0
    assert fused["vit.model.blocks.0.attn.qkv.weight"] < fused["vit.model.blocks.5.attn.qkv.weight"] <= 0.5
    assert lr_scales(timm.create_model("test_vit"), Recipe(backbone_lr=0.5))["pos_embed"] == 0.5


def test_fixed_batchnorm_keeps_its_statistics_and_learns_its_scales():
    model = create_model("resnet_micro")
    learn(model, Recipe(fix_batchnorm=True))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(norm.weight.grad is not None for norm in norms)
    learn(model, Recipe())
    assert all(norm.training for norm in norms)
