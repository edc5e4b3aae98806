"""What is lost without some tokens, where it can be told beforehand."""

import json
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from tokenfusion import InputError, create_model, fuse
from tokenfusion.analyze.ablation import (
    WHOLE,
    all_logits,
    measure_ablation,
    replaced,
    token_means,
    whole_branch,
)
from tokenfusion.analyze.token_spans import TokenSpan, token_spans
from tokenfusion.analyze.tokens import COLOURS, PreparedBatches, measure_tokens, tokens_summary
from tokenfusion.classifier import Classifier
from tokenfusion.evaluate import evaluate
from tokenfusion.intervals import mean_interval, tango_interval
from tokenfusion.metrics import wilson_interval


def batches(height=32, width=32, classes=10):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, height, width, generator=generator), torch.randint(classes, (n,), generator=generator))
        for n in (4, 3)
    ]


def fused(strategy, operator, **changes):
    torch.manual_seed(0)
    config = {"img_size": 32, "num_classes": 10, "gate": 1.0} | changes
    return fuse("resnet_micro", "vit_micro", strategy, operator, **config).eval()


def changes_by(result, tokens):
    return [row["loss_change"]["mean"] for row in result["replaced"] if row["tokens"] == tokens]


def test_the_interval_by_hand():
    found = mean_interval(torch.tensor([1.0, 0.0, -1.0, 1.0]))
    assert found["mean"] == pytest.approx(0.25)
    half = 3.1824463 * 0.9574271 / 2  # t of 3 degrees of freedom times the standard deviation, over √4
    assert found["ci95"] == pytest.approx([0.25 - half, 0.25 + half])
    assert mean_interval(torch.tensor([2.0])) == {"mean": 2.0, "ci95": None}


def flips(gained, lost, count):
    return torch.tensor([1.0] * gained + [-1.0] * lost + [0.0] * (count - gained - lost))


@pytest.mark.parametrize(("gained", "lost", "count"), [(12, 2, 44), (0, 3, 21), (5, 5, 17)])
def test_an_interval_of_a_paired_change_ends_where_the_score_test_begins_to_reject(gained, lost, count):
    found = tango_interval(flips(gained, lost, count))
    assert found["mean"] == pytest.approx((gained - lost) / count)
    for change in found["ci95"]:
        lowest, highest = (
            max(0, -change),
            (1 - change) / 2,
        )  # of the share lost; the share gained is that plus the change
        shares = np.linspace(lowest, highest, 2_000_003)[1:-1]
        likelihood = gained * np.log(shares + change) + (count - gained - lost) * np.log1p(-2 * shares - change)
        likelihood += lost * np.log(shares)
        likeliest = shares[likelihood.argmax()]
        variance = count * (2 * likeliest + change - change**2)
        assert abs(gained - lost - count * change) / variance**0.5 == pytest.approx(1.959964, rel=1e-4)


def test_an_interval_of_a_change_at_its_edges():
    none, all_gained = tango_interval(flips(0, 0, 256)), tango_interval(flips(7, 0, 7))
    assert none["ci95"] == pytest.approx([-wilson_interval(0, 256)[1], wilson_interval(0, 256)[1]])
    assert all_gained["ci95"][1] == 1
    assert 0 < all_gained["ci95"][0] < 1
    assert tango_interval(flips(0, 7, 7))["ci95"] == pytest.approx([-1, -all_gained["ci95"][0]])


def test_which_is_needed_more_is_judged_by_the_difference_on_the_same_images():
    result = measure_tokens(create_model("tokenfusion_early_micro", num_classes=10), batches())
    apart = {"loss_difference": {"mean": -0.2, "ci95": [-0.3, -0.1]}, "tokens": ["patch", "pixel"]}
    for row in result["replaced"]:  # wide intervals that overlap say nothing of the difference
        row["loss_change"] = {"mean": 1.0, "ci95": [-5.0, 7.0]}
    said = tokens_summary(result | {"compared": [apart]})
    assert "It needs the pixel tokens more: without them the loss is 0.100 to 0.300 higher." in said
    level = {"loss_difference": {"mean": 0.2, "ci95": [-0.1, 0.5]}, "tokens": ["patch", "pixel"]}
    assert "these images do not say" in tokens_summary(result | {"compared": [level]})


class Tracked:
    """Batches that are made anew in every pass, and how many of their images were alive at once."""

    def __init__(self):
        self.alive, self.most, self.passes = weakref.WeakSet(), 0, 0

    def __iter__(self):
        self.passes += 1
        for _ in range(5):
            images = torch.randn(2, 3, 32, 32)
            self.alive.add(images)
            self.most = max(self.most, len(self.alive))
            yield images, torch.tensor([1, 2])


def test_images_are_let_go_batch_by_batch():
    data = Tracked()
    assert measure_tokens(create_model("tokenfusion_late_micro", num_classes=10), data)["images"] == 10
    assert data.passes > 4
    assert data.most <= 2


def test_large_maps_come_in_small_batches():
    sizes = [(32, 32), (256, 256), (512, 512)]
    by_size = [
        PreparedBatches(Classifier.create("vit_micro", "ab", img_size=size), None).batch_size() for size in sizes
    ]
    assert by_size == [64, 1, 1]  # of 65, 4,097 and 16,385 tokens
    middle = Classifier.create("vit_micro", "ab", img_size=(96, 96))
    assert PreparedBatches(middle, None).batch_size() == 6  # 577 tokens: 332,929 elements a head


def test_kinds_of_tokens_have_colours_of_their_own():
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_without_the_pixels_that_a_model_ignores_nothing_changes():
    model = fused("layerwise", "cross")
    with torch.no_grad():
        model.readout.gate.weight.zero_()
        for exchange in model.exchanges:
            exchange.operator.to_pixels.proj.weight.zero_()
            exchange.operator.to_pixels.proj.bias.zero_()
    result = measure_ablation(model, batches())
    assert changes_by(result, "pixel") == [0, 0, 0, 0]
    of_pixels = [row["top1_change"] for row in result["replaced"] if row["tokens"] == "pixel"]
    _, high = wilson_interval(0, 7)  # no flip among 7 images leaves room for some
    assert of_pixels == 4 * [{"mean": 0, "ci95": pytest.approx([-high, high])}]
    pair = result["compared"][0]
    assert pair["tokens"] == ["patch", "pixel"]
    whole = next(row for row in result["replaced"] if (row["layer"], row["tokens"]) == (WHOLE, "patch"))
    assert pair["loss_difference"] == {key: pytest.approx(value) for key, value in whole["loss_change"].items()}
    assert min(map(abs, changes_by(result, "patch"))) > 1e-6


def test_without_the_patches_that_a_model_ignores_nothing_changes():
    model = fused("early", "joint")
    with torch.no_grad():  # every patch is the same whatever the image
        model.vit.embed.patches.weight.zero_()
        model.vit.embed.positions.table.zero_()
    result = measure_ablation(model, batches())
    first = result["replaced"][0]
    assert (first["layer"], first["tokens"]) == ("vit.blocks.0", "patch")
    assert first["loss_change"]["mean"] == pytest.approx(0, abs=1e-6)
    assert abs(changes_by(result, "pixel")[0]) > 1e-6


@pytest.mark.parametrize("source", ["patch", "pixel"])
def test_the_mean_is_over_images_and_places(source):
    model, data = create_model("tokenfusion_early_micro", num_classes=10).eval(), batches()
    target = next(span for span in token_spans(model, (32, 32)) if span.source == source)
    with torch.no_grad():
        means, logits = token_means(model, [target], data)
        images = torch.cat([images for images, _ in data])
        torch.testing.assert_close(logits, model(images))
        patches, _ = model.vit.embed(images)
        tokens = patches[:, 1:] if source == "patch" else model.pixel_source(model.cnn(images))
        torch.testing.assert_close(means[target].float(), tokens.mean((0, 1)))
        with replaced(model, means):
            ablated = model(images)
        part = model.vit.embed if source == "patch" else model.pixel_source

        def mean_instead(_module, _inputs, output):  # the same from the other side: where the tokens are made
            if source == "pixel":
                return tokens.mean((0, 1)).expand_as(output)
            return torch.cat([output[0][:, :1], tokens.mean((0, 1)).expand_as(tokens)], dim=1), output[1]

        with part.register_forward_hook(mean_instead):
            torch.testing.assert_close(ablated, model(images))
    assert not ablated.equal(logits)


def test_what_is_replaced_where():
    layers = {
        "tokenfusion_early_micro": ["vit.blocks.0", "vit.blocks.1"],
        "tokenfusion_late_micro": ["operators.0"],
        "tokenfusion_layerwise_micro": [f"exchanges.{i}.operator" for i in range(3)],
    }
    for name, expected in layers.items():
        spans = token_spans(create_model(name), (32, 32))
        assert [(span.module, span.source) for span in spans] == [
            (module, source) for module in expected for source in ("patch", "pixel")
        ]
    small, large, *_ = (span[2:] for span in token_spans(create_model("crossvit_micro"), (48, 32)))
    assert (small, large) == ((0, 1, 97, (12, 8)), (1, 1, 25, (6, 4)))
    patch, pixel, *_ = (span[2:] for span in token_spans(create_model("tokenfusion_early_micro"), (48, 32)))
    assert (patch, pixel) == ((0, 1, 25, (6, 4)), (0, 25, 49, (6, 4)))


def test_uniform_attention_is_shared_by_number():
    model = create_model("tokenfusion_early_micro", num_classes=10)
    with torch.no_grad():
        for block in model.vit.blocks:
            block.attn.qkv.weight[: 2 * model.vit.dim].zero_()
    result = measure_tokens(model, batches(48, 32))
    for layer in result["attention"]:
        for given in layer["to"].values():
            assert given["attention"]["mean"] == pytest.approx(given["share_of_tokens"], rel=1e-5)
        assert {source: given["tokens"] for source, given in layer["to"].items()} == {
            "cls": 1,
            "patch": 24,
            "pixel": 24,
        }
    assert sum(share["mean"] for share in result["rollout"].values()) == pytest.approx(1)
    assert "which are 49% of them" in tokens_summary(result)


def test_crossvit_compares_its_branches():
    model = create_model("crossvit_micro", num_classes=10)
    with torch.no_grad():
        model.head.small.weight.zero_()  # the small branch's CLS is not read
        for stage in model.stages:  # and the large one asks it nothing
            stage.fusion.large.attn.proj.weight.zero_()
    result = measure_tokens(model, batches())
    assert changes_by(result, "small_patch") == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert max(map(abs, changes_by(result, "large_patch"))) > 1e-4
    assert "Without its small_patch tokens at all" in tokens_summary(result)


def test_the_patches_of_an_exchange_are_replaced_where_they_enter():
    result = measure_ablation(fused("layerwise", "add"), batches())
    by_layer = {(row["layer"], row["tokens"]): row["loss"] for row in result["replaced"]}
    assert by_layer[WHOLE, "patch"] == pytest.approx(by_layer["exchanges.0.operator", "patch"])  # its gate is open
    assert by_layer[WHOLE, "pixel"] != by_layer["exchanges.0.operator", "pixel"]


@pytest.mark.parametrize(
    ("strategy", "operator"),
    [("late", "cross"), ("late", "joint"), ("layerwise", "add"), ("layerwise", "cls"), ("early", "add")],
)
def test_behind_closed_gates_no_image_is_left_without_its_patches(strategy, operator):
    model, data = fused(strategy, operator), batches()
    model.set_gates(0)
    with torch.no_grad():
        means, logits = token_means(model, whole_branch(model, (32, 32), "patch"), data)
        with replaced(model, means):
            ablated = all_logits(model, data)
    assert logits.std(0).min() > 1e-4
    torch.testing.assert_close(ablated, ablated[:1].expand_as(ablated))


@pytest.mark.parametrize("name", ["tokenfusion_layerwise_micro", "crossvit_micro"])
def test_the_model_is_left_as_it_was(name):
    model = create_model(name, num_classes=10).train()
    model.get_submodule("head_drop" if name == "crossvit_micro" else "cnn").eval()
    before = [(module.training, dict(module._forward_pre_hooks)) for module in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    measure_tokens(model, batches())
    broken = [(images[:, :2], labels) for images, labels in batches()]
    for measure in (measure_tokens, measure_ablation):
        with pytest.raises(RuntimeError, match="expected input"):
            measure(model, broken)
    assert [(module.training, dict(module._forward_pre_hooks)) for module in model.modules()] == before
    assert all(value.equal(weights[key]) for key, value in model.state_dict().items())
    place = token_spans(model, (32, 32))[0].module
    with pytest.raises(ZeroDivisionError), replaced(model, {TokenSpan(place, "patch", 0, 0, 1, (1, 1)): 0}):
        raise ZeroDivisionError
    assert not model.get_submodule(place)._forward_pre_hooks


@pytest.mark.parametrize(("name", "kind"), [("resnet_micro", "ResNet"), ("cmt_micro", "CMT"), ("resnet18", "ResNet")])
def test_models_without_a_row_of_blocks(name, kind):
    with pytest.raises(InputError) as error:
        measure_tokens(create_model(name, num_classes=10), batches())
    assert f"a {kind} is none of the transformers whose blocks are known" in str(error.value)
    assert "take a ViT, DeiT, BEiT or EVA of timm's, or deepvit_*, crossvit_* or vit_micro" in str(error.value)


def test_no_image():
    with pytest.raises(InputError, match="no image"):
        measure_tokens(create_model("vit_micro"), [])


def test_the_command(command, run, tmp_path):
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    for label in (7, 3):  # two of the run's classes, so that the data's numbers are not the model's
        folder = tmp_path / "photos" / str(label)
        folder.mkdir(parents=True)
        for i in np.flatnonzero(labels == label)[:6]:
            Image.fromarray((digits[i].reshape(8, 8) * 15.9).astype(np.uint8)).save(folder / f"{i}.png")
    status, output, _ = command("analyze", "tokens", run, tmp_path / "photos", "--out", tmp_path / "out")
    assert status == 0
    result = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert result["top1"] == pytest.approx(evaluate(run, str(tmp_path / "photos"))["top1"])
    assert result["images"] == 12
    assert result["summary"] in output
    assert "vit.blocks.1" in output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tokens.json", "tokens.png", "tokens.svg"}
    status, _, errors = command("analyze", "tokens", "vit_micro")
    assert (status, "DATA is missing" in errors) == (2, True)
