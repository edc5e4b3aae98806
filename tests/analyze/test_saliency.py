"""Maps of what a model looks at, against formulas and against two other libraries."""

import pytest
import timm
import torch

from tokenfusion import InputError, create_model, fuse, record_attention
from tokenfusion.analyze.faithfulness import area, areas, baselines, curve, importance, measure_faithfulness
from tokenfusion.analyze.saliency import grad_cam, saliency
from tokenfusion.layers.tokens import tokens_to_map

CLASSES = torch.tensor([3, 1])


def images(height=48, width=32, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def model_of(name, **changes):
    torch.manual_seed(0)
    return create_model(name, num_classes=5, **changes).eval()


def test_of_an_averaged_map_grad_cam_is_the_heads_weights_times_the_map():
    model = model_of("resnet_micro")
    with torch.no_grad():
        features = model.forward_features(images())  # (B, C, h, w), which the head averages
        weights = model.head.weight[CLASSES] / (features.shape[2] * features.shape[3])
        expected = torch.einsum("bc,bchw->bhw", weights, features).relu()
    found = grad_cam(model, images(), CLASSES)
    assert set(found) == {"cnn"}
    assert 0 < (expected == 0).float().mean() < 1  # the ReLU is put to the test
    torch.testing.assert_close(found["cnn"], expected)


def test_of_a_transformer_it_reads_the_last_blocks_input():
    model = model_of("vit_micro", img_size=32)
    tokens, _ = model.embed(images(32, 32))
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    tokens = tokens.detach().requires_grad_()
    logits = model.forward_head(model.norm(model.blocks[-1](tokens)))
    (gradient,) = torch.autograd.grad(logits[0, 3] + logits[1, 1], [tokens])
    weights = gradient[:, 1:].mean(1, keepdim=True)
    expected = (weights * tokens[:, 1:]).sum(2).relu().reshape(2, 8, 8).detach()
    torch.testing.assert_close(saliency(model, images(32, 32), CLASSES)["transformer"], expected)


@pytest.mark.parametrize("name", ["resnet_micro", "vit_micro"])
def test_grad_cam_against_pytorch_grad_cam(name):
    oracle = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, pixels = model_of(name, img_size=32), images(32, 32)
    last = model.cnn.stages[-1] if name == "resnet_micro" else model.blocks[-2]  # whose output the last block reads
    reshape = None if name == "resnet_micro" else lambda tokens: tokens_to_map(tokens[:, 1:], (8, 8))
    targets = [ClassifierOutputTarget(int(label)) for label in CLASSES]
    with oracle.GradCAM(model, [last], reshape_transform=reshape) as cam:
        expected = torch.from_numpy(cam(pixels, targets=targets))  # scaled to 0 … 1 and enlarged
    (found,) = grad_cam(model, pixels, CLASSES).values()
    large = importance(found, (32, 32))
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    torch.testing.assert_close((large - low) / (high - low), expected, atol=0.02, rtol=0)


def test_grad_cam_against_captum():
    captum = pytest.importorskip("captum.attr")
    model = model_of("resnet_micro")
    layer = captum.LayerGradCam(model, model.cnn.stages[-1])
    expected = layer.attribute(images(), CLASSES, relu_attributions=True)
    torch.testing.assert_close(grad_cam(model, images(), CLASSES)["cnn"], expected[:, 0].detach())


def test_cls_attention_is_the_last_layers():
    model = model_of("tokenfusion_early_micro")
    with torch.no_grad(), record_attention(model) as maps:
        model(images())
    row = maps["vit.blocks.1.attn"].map[:, :, 0].mean(1)  # [CLS; 24 patches; 24 pixels]
    found = saliency(model, images(), CLASSES, "attention")
    torch.testing.assert_close(found["transformer"], row[:, 1:25].reshape(2, 6, 4))
    torch.testing.assert_close(found["cnn"], row[:, 25:].reshape(2, 6, 4))


def test_registers_and_a_distillation_token_are_left_out():
    for name, changes in (("vit_tiny_patch16_224", {"reg_tokens": 3}), ("deit_tiny_distilled_patch16_224", {})):
        model = timm.create_model(name, img_size=(48, 32), num_classes=5, depth=2, **changes).eval()
        prefix = model.num_prefix_tokens
        with torch.no_grad(), record_attention(model) as maps:
            model(images())
        row = maps["blocks.1.attn"].map[:, :, 0].mean(1)[:, prefix:]
        found = saliency(model, images(), CLASSES, "attention")["transformer"]
        torch.testing.assert_close(found, row.reshape(2, 3, 2))
        assert grad_cam(model, images(), CLASSES)["transformer"].shape == (2, 3, 2)


def fused(cnn, vit, strategy, operator):
    torch.manual_seed(0)
    return fuse(cnn, vit, strategy, operator, img_size=(48, 32), num_classes=5, gate=1.0).eval()


GRIDS = {
    ("resnet18", "vit_tiny_patch16_224", "early", "joint"): {"cnn": (2, 1), "transformer": (3, 2)},
    ("resnet_micro", "deepvit_micro", "late", "cls"): {"cnn": (6, 4), "transformer": (12, 8)},
    ("densenet121", "vit_micro", "layerwise", "cross"): {"cnn": (1, 1), "transformer": (12, 8)},
    ("resnet_micro", "vit_micro", "early", "add"): {"cnn": (6, 4), "transformer": (12, 8)},
    ("resnet_micro", "crossvit_micro", "layerwise", "add"): {
        "cnn": (6, 4),
        "transformer_small": (12, 8),
        "transformer_large": (6, 4),
    },
}


@pytest.mark.parametrize("parts", GRIDS)
def test_both_branches_of_a_fusion_on_their_own_grids(parts):
    model = fused(*parts)
    maps = grad_cam(model, images(), CLASSES)
    assert {branch: tuple(found.shape[1:]) for branch, found in maps.items()} == GRIDS[parts]
    assert all(found.min() >= 0 and found.isfinite().all() for found in maps.values())
    one = saliency(model, images(), CLASSES, branch="cnn")
    assert set(one) == {"cnn"}
    torch.testing.assert_close(one["cnn"], maps["cnn"])


def test_the_class_decides_and_frozen_weights_do_not_matter():
    model = model_of("tokenfusion_late_micro").train()
    free = grad_cam(model, images(), CLASSES)
    assert not free["cnn"].equal(grad_cam(model, images(), CLASSES.flip(0))["cnn"])
    frozen = grad_cam(model.requires_grad_(False), images(), CLASSES)
    torch.testing.assert_close(frozen, free)
    assert model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "method", "branch", "reason"),
    [
        ("vit_micro", "gradcam", "cnn", "a ViT has no cnn"),
        ("resnet_micro", "gradcam", "transformer", "a ResNet has no transformer"),
        ("resnet_micro", "rollout", "both", "has no attention that can be seen"),
        ("resnet_micro", "attention", "both", "has no attention that can be seen"),
        ("cmt_micro", "rollout", "both", "convolutions between its stages mix places"),
        ("tokenfusion_layerwise_micro", "attention", "cnn", "no attention .* reads its tokens, which are added"),
        ("vit_micro", "gradcm", "both", "did you mean 'gradcam'"),
    ],
)
def test_what_makes_no_sense(name, method, branch, reason):
    with pytest.raises(InputError, match=reason):
        saliency(model_of(name), images(32, 32), CLASSES, method, branch)


def test_a_map_that_is_not_finite_is_no_result():
    model = model_of("vit_micro")
    torch.nn.init.constant_(model.head.weight, torch.nan)
    with pytest.raises(InputError, match="the map of transformer is not finite"):
        saliency(model, images(), torch.tensor([1, 2]))


def test_features_that_are_no_map():
    model = create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=5, depths=(1, 1, 1, 1))
    with pytest.raises(InputError, match="not a map"):
        grad_cam(model, images(64, 64), CLASSES)


def test_curves_by_hand():
    def mean(changed):
        return changed.mean((1, 2, 3))

    whole, base = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    order = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
    torch.testing.assert_close(curve(mean, whole, base, order, steps=4), torch.tensor([[1.0, 0.75, 0.5, 0.25, 0.0]]))
    first = curve(lambda changed: changed[:, 0, 0, 1], whole, base, order, steps=4)  # the second in the order
    torch.testing.assert_close(first, torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(area(first), torch.tensor([0.375]))


def test_a_perfect_explanation_beats_chance_and_the_centre():
    pixels = images(32, 32, batch=8).abs()

    def corner(changed):  # what the model looks at: how much of the corner is still the image's
        return (changed - pixels)[:, :, :8, :8].abs().mean((1, 2, 3)).neg().exp()

    perfect = torch.zeros(8, 4, 4)
    perfect[:, 0, 0] = 1
    found = measure_faithfulness([(pixels, {"cnn": perfect}, corner)])["cnn"]
    for kind in ("random", "centre"):
        assert found["deletion"][f"map_minus_{kind}"]["ci95"][1] < -0.05
        assert found["insertion"][f"map_minus_{kind}"]["ci95"][0] > 0.02
    worst = areas(corner, pixels, importance(-perfect, (32, 32)))
    assert float(worst["deletion"].mean()) > found["deletion"]["centre"]["mean"]


def test_the_centre_comes_first_and_chance_knows_nothing():
    orders = baselines(torch.zeros(2, 3, 5), (7, 9), torch.Generator().manual_seed(0))
    assert int(orders["centre"][0].argmax()) == 3 * 9 + 4
    assert not orders["random"][0].equal(orders["random"][1])
