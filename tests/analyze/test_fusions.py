"""Every strategy with every operator can be looked into; what cannot be computed is refused in words."""

import copy
import json
from functools import cache
from itertools import product

import pytest
import timm
import torch
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer

from children import fork_runs
from runs import small_recipe
from tokenfusion import InputError, fuse, record_attention
from tokenfusion.analyze.ablation import all_logits, replaced, token_means, whole_branch
from tokenfusion.analyze.rollout import attention_rollout
from tokenfusion.analyze.saliency import METHODS, require_readable, saliency
from tokenfusion.analyze.token_spans import token_spans
from tokenfusion.analyze.tokens import measure_tokens, tokens_summary
from tokenfusion.evaluate import evaluate
from tokenfusion.models.adapters import OneWayCNN
from tokenfusion.models.fuse import FUSABLE
from tokenfusion.models.operators import OPERATORS
from tokenfusion.training import start

SIZE = (32, 48)
CNNS = {
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 12, 20), "stem_width": 4, "output_stride": 16},
    "mambaout_femto": {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 20)},  # gives its maps all at once
}
PROBE = "fuse(wide(resnet_micro,0.1),wide(vit_micro,0.1),probe)"
READS = {("late", "add"): "avg"}
"""What does not fit a transformer whose head reads CLS: then it reads the patches' mean."""
REFUSED = {("early", "cls"), ("early", "query")}
CELLS = sorted({*product(FUSABLE, OPERATORS)} - REFUSED)


def fused(strategy, operator, cnn="resnet18"):
    """Odd widths, no gate closed and no weight zero; each is built once, and a test has a copy of its own."""
    return copy.deepcopy(built(strategy, operator, cnn))


@cache
def built(strategy, operator, cnn):
    torch.manual_seed(0)
    pool = READS.get((strategy, operator), "token")
    config = {"img_size": SIZE, "patch_size": 8, "embed_dim": 12, "depth": 4, "num_heads": 3, "num_classes": 5}
    vit = VisionTransformer(**config, class_token=pool == "token", global_pool=pool, dynamic_img_size=True)
    model = fuse(timm.create_model(cnn, **CNNS[cnn]), vit, strategy, operator, img_size=SIZE, gate=1.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def images():
    return torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))


CLASSES = torch.arange(5)


def one_image():
    """Once for each class, some of which every place speaks for."""
    return images()[:1].expand(5, -1, -1, -1)


def batches():
    return [(images(), torch.tensor([3, 1, 0]))]


@pytest.mark.parametrize(("strategy", "operator"), CELLS)
def test_grad_cam_and_attention_see_both_branches(strategy, operator):
    model = fused(strategy, operator)
    maps = saliency(model, one_image(), CLASSES)
    assert set(maps) == {"cnn", "transformer"}
    assert all(found.max() > 0 for found in maps.values())
    assert maps["transformer"].shape == (5, 4, 6)
    seen = saliency(model, images(), CLASSES[:3], "attention")
    assert set(seen) == ({"transformer"} if operator == "add" else {"cnn", "transformer"})  # the pixels are added


@pytest.mark.parametrize(("strategy", "operator"), CELLS)
def test_rollout_is_shares_of_both_kinds_or_refused_before_the_work(strategy, operator):
    model = fused(strategy, operator)
    if strategy == "probe":
        with pytest.raises(InputError, match=r"cannot follow a ProbeFusion: its head .*; take --method gradcam"):
            require_readable(model, SIZE, "rollout")
        return
    shares = attention_rollout(model, images()).shares()
    torch.testing.assert_close(sum(shares.values()), torch.ones(3))
    assert set(shares) <= {"cls", "patch", "pixel"}
    assert shares["pixel"].min() > 0.05
    assert shares["patch"].min() > 0.02


@pytest.mark.parametrize(("strategy", "operator"), CELLS)
def test_without_either_kind_of_token_no_image_is_left(strategy, operator):
    model = fused(strategy, operator)
    both = [span for source in ("patch", "pixel") for span in whole_branch(model, SIZE, source)]
    with torch.no_grad():
        means, logits = token_means(model, both, batches())
        with replaced(model, means):
            ablated = all_logits(model, batches())
    assert logits.std(0).max() > 1e-3
    torch.testing.assert_close(ablated, ablated[:1].expand_as(ablated), rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", FUSABLE)
def test_a_cnn_that_gives_its_maps_at_once_is_seen_as_well(strategy):
    model = fused(strategy, "cross", "mambaout_femto")
    assert isinstance(model.cnn, OneWayCNN)
    found = saliency(model, one_image(), CLASSES, branch="cnn")["cnn"]
    with torch.no_grad():
        assert found.shape[1:] == model.cnn(images()).shape[2:]
    assert found.max() > 0


def test_of_a_linear_classifier_grad_cam_is_its_weights_times_the_map():
    """With the gate closed and no votes the last map is read by its mean alone."""
    model, pixels = fused("probe", "query"), one_image()
    with torch.no_grad():
        model.gate.weight.zero_()
        model.votes.weight.zero_()
        last = model.cnn(pixels)
        start = model.channels[0] - last.shape[1]
        weight = (model.head.weight * model.standardize.scale)[:, start : model.channels[0]]
        expected = torch.einsum("bc,bchw->bhw", weight, last).relu() / (last.shape[2] * last.shape[3])
    torch.testing.assert_close(saliency(model, pixels, CLASSES, branch="cnn")["cnn"], expected)


def test_learned_queries_attend_for_cls():
    model = fused("late", "query")
    with torch.no_grad():
        model.readout.gate.weight.zero_()
        model.gate.weight.fill_(1.0)
        before = fused("late", "query")
        before.set_gates(0.0)
        alone = attention_rollout(before, images())
        with record_attention(model) as maps:
            model(images())
    last = maps[f"operators.{len(model.operators) - 1}.attn"]
    assert last.layout.queries[0].source == "query"
    first = maps["operators.0.attn"].map.mean((1, 2))  # (B, [CLS; patches; pixels])
    own = torch.cat([alone.state["cls"], alone.state["patch"]], dim=1)  # made of [CLS; patches]
    tokens, pixels = own.shape[1], first.shape[1] - own.shape[1]
    own = torch.cat([own[..., :tokens], own.new_zeros(3, tokens, pixels)], dim=2)
    entered = torch.cat([torch.zeros(pixels, tokens), torch.eye(pixels)], dim=1).expand(3, -1, -1)
    for record in (maps["operators.0.attn"], last):
        told = record.map.mean((1, 2))[:, None] @ torch.cat([own, entered], dim=1)
        own = torch.cat([(own[:, :1] + told) / 2, own[:, 1:]], dim=1)
    torch.testing.assert_close(attention_rollout(model, images()).head(), own[:, 0])


def test_what_either_side_of_a_probe_is_worth_is_measured_without_rollout():
    model = fused("probe", "cross")
    result = measure_tokens(model, batches())
    assert [span.module for span in token_spans(model, SIZE)] == ["sight"] * 2 + ["operator"] * 2
    assert {row["tokens"] for row in result["replaced"] if row["layer"] == "whole branch"} == {"patch", "pixel"}
    assert result["rollout"] == {}
    assert "rollout cannot follow a ProbeFusion: its head weighs every token" in tokens_summary(result)


@pytest.fixture(scope="module")
def probe_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("probe") / "run"
    recipe = small_recipe(model=PROBE, epochs=1, drop_path=0.0, ema=0.0, precision="fp32", val_fraction=0.9)
    start(recipe, run, Console(quiet=True))
    evaluate(run)
    return run


@pytest.mark.parametrize("method", METHODS)
def test_a_probes_run_is_explained_by_the_command(command, probe_run, digit, tmp_path, method):
    out = tmp_path / "out"
    status, output, errors = command("explain", probe_run, digit, "--method", method, "--out", out)
    if method == "rollout":
        assert (status, output, out.exists()) == (2, "", False)
        assert "rollout cannot follow a ProbeFusion" in errors
    else:
        assert (status, errors) == (0, "")
        drawn = json.loads((out / "explain.json").read_text())["images"][0]["overlays"]
        assert [one["branch"] for one in drawn] == ["cnn", "transformer"][:: -1 if method == "attention" else 1]


def test_a_probes_tokens_are_measured_by_the_command(command, probe_run, tmp_path):
    arguments = ("analyze", "tokens", probe_run, "--num-images", 64, "--out", tmp_path / "out")
    status, output, _ = command(*arguments)
    assert status == 0
    assert "Without its pixel tokens at all" in output
    assert json.loads((tmp_path / "out" / "tokens.json").read_text())["no_rollout"] in output


def test_a_probe_is_compared_by_the_command(command, tmp_path, monkeypatch):
    fork_runs(monkeypatch)
    out = tmp_path / "out"
    small = ("--img-size", 8, "--val-fraction", 0.2, "--batch-size", 128, "--epochs", 1, "--ema", 0, "--lr", 4e-3)
    status, output, errors = command("compare", "digits", "--models", PROBE, *small, "--seeds", 1, "--out", out)
    assert status == 0, output + errors
    (row,) = json.loads((out / "comparison.json").read_text())["models"]
    assert row["failed"] == []
    assert {side["tokens"] for side in row["sides"]} == {"patch", "pixel"}
