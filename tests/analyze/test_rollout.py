"""Attention rollout against products computed by hand."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from tokenfusion import InputError, create_model, fuse, record_attention
from tokenfusion.analyze.rollout import Rollout, attention_rollout, on_finest
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup
from tokenfusion.models.operators import Operator
from tokenfusion.models.token_fusion import LateFusion
from tokenfusion.models.transformer import ViT

CLS, PATCHES, PIXELS = TokenGroup("cls"), TokenGroup("patch", (1, 2)), TokenGroup("pixel", (1, 1))


def images(height=24, width=40, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def vit(**changes):
    torch.manual_seed(0)
    config = {"img_size": (24, 40), "patch_size": 8, "dim": 12, "depth": 3, "heads": 3, "mlp_ratio": 2.0}
    model = ViT(**config | {"num_classes": 5} | changes).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.normal_()
    return model


def test_two_layers_by_hand():
    layout = AttentionLayout.among((CLS, TokenGroup("patch", (1, 1))))
    rollout = Rollout()
    rollout.follow("one", layout, torch.tensor([[[0.5, 0.5], [0.0, 1.0]]]))
    rollout.follow("two", layout, torch.tensor([[[0.2, 0.8], [1.0, 0.0]]]))
    # (A + I) / 2 is [[.75, .25], [0, 1]], then [[.6, .4], [.5, .5]]; the second times the first
    torch.testing.assert_close(rollout.state["cls"], torch.tensor([[[0.45, 0.55]]]))
    torch.testing.assert_close(rollout.state["patch"], torch.tensor([[[0.375, 0.625]]]))
    torch.testing.assert_close(rollout.maps()["patch"], torch.tensor([[[0.55]]]))


def test_of_a_vit_it_is_the_product_of_its_layers():
    model = vit()
    with torch.no_grad(), record_attention(model) as maps:
        model(images())
    product = torch.eye(16)
    for record in maps.values():
        product = (record.map.mean(1) + torch.eye(16)) / 2 @ product
    rollout = attention_rollout(model, images())
    torch.testing.assert_close(rollout.head(), product[:, 0])
    torch.testing.assert_close(rollout.maps()["patch"], product[:, 0, 1:].reshape(2, 3, 5))
    torch.testing.assert_close(rollout.shares()["cls"], product[:, 0, 0])


def test_where_the_head_reads_the_mean_of_the_patches_so_does_the_rollout():
    torch.manual_seed(0)
    config = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
    for pool, read in (("avg", slice(1, None)), ("token", slice(0, 1))):
        model = VisionTransformer(**config, global_pool=pool).eval()
        for block in model.blocks:
            torch.nn.init.normal_(block.attn.qkv.weight)
        rollout = attention_rollout(model, images())
        made_of = torch.cat([rollout.state["cls"], rollout.state["patch"]], dim=1)
        torch.testing.assert_close(rollout.head(), made_of[:, read].mean(1))


def test_cls_alone_asks():
    rollout = Rollout()
    rollout.enter((CLS, PATCHES), 1)
    rollout.follow("ask", AttentionLayout((CLS,), (CLS, PIXELS)), torch.tensor([[[0.4, 0.6]]]))
    torch.testing.assert_close(rollout.state["cls"], torch.tensor([[[0.7, 0.0, 0.0, 0.3]]]))
    torch.testing.assert_close(rollout.state["patch"][0], torch.eye(4)[1:3])


def test_two_that_ask_each_other_both_see_what_was_there_before():
    rollout = Rollout()
    rollout.follow("operator", AttentionLayout((PATCHES,), (PIXELS,)), torch.ones(1, 2, 1))
    rollout.follow("operator", AttentionLayout((PIXELS,), (PATCHES,)), torch.tensor([[[0.25, 0.75]]]))
    torch.testing.assert_close(rollout.state["patch"], torch.tensor([[[0.5, 0, 0.5], [0, 0.5, 0.5]]]))
    torch.testing.assert_close(rollout.state["pixel"], torch.tensor([[[0.125, 0.375, 0.5]]]))


def test_an_addition_counts_half():
    model = fuse("resnet_micro", "vit_micro", "early", "add", img_size=32, num_classes=5, gate=1.0)
    model.readout.gate.weight.data.zero_()
    shares = attention_rollout(model, images(32, 32)).shares()
    torch.testing.assert_close(shares["pixel"], shares["patch"])
    model.exchange.gate.weight.data.fill_(0.5)  # half of what was alone, half of what is half pixels
    shares = attention_rollout(model, images(32, 32)).shares()
    torch.testing.assert_close(3 * shares["pixel"], shares["patch"])


@pytest.mark.parametrize("strategy", ["late", "early", "layerwise"])
def test_the_readout_counts_half(strategy):
    model = create_model(f"tokenfusion_{strategy}_micro")
    model.readout.gate.weight.data.zero_()
    before = attention_rollout(model, images(48, 32))
    model.readout.gate.weight.data.fill_(1.0)
    torch.testing.assert_close(
        attention_rollout(model, images(48, 32)).head(), (before.head() + before.state["pixel"].mean(1)) / 2
    )


@pytest.mark.parametrize("strategy", ["late", "layerwise"])
def test_through_a_closed_gate_nothing_comes(strategy):
    model = create_model(f"tokenfusion_{strategy}_micro")
    assert attention_rollout(model, images(48, 32)).shares()["pixel"].min() > 0.05
    model.set_gates(0)
    assert attention_rollout(model, images(48, 32)).shares()["pixel"].max() == 0


MODELS = ("tokenfusion_early_micro", "tokenfusion_late_micro", "tokenfusion_layerwise_micro", "crossvit_micro")


@pytest.mark.parametrize("name", [*MODELS, "deepvit_micro"])
def test_shares_are_shares_and_the_model_is_left_as_it_was(name):
    model = create_model(name).train()
    rollout = attention_rollout(model, images(48, 32))
    torch.testing.assert_close(sum(rollout.shares().values()), torch.ones(2))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_each_exchange_brings_its_own_pixels():
    model = fuse("resnet_micro", "vit_micro", "layerwise", "joint", img_size=32, num_classes=5)
    grids = [origin.grid for origin in attention_rollout(model, images(32, 32)).origins if origin.source == "pixel"]
    assert grids == [(8, 8), (8, 8), (4, 4)]


def test_maps_of_several_grids_keep_their_total():
    coarse, fine = torch.rand(2, 1, 3), torch.rand(2, 2, 6)
    both = on_finest([coarse, fine])
    assert both.shape == (2, 2, 6)
    torch.testing.assert_close(
        on_finest([torch.full((1, 1, 2), 0.5), torch.zeros(1, 2, 4)]), torch.full((1, 2, 4), 0.125)
    )


class Silent(Operator):
    """Updates tokens in a way that no attention map tells of."""

    def forward(self, tokens, *_pixels_and_grids):
        return tokens, None


def test_an_operator_that_nothing_is_known_of():
    vit, cnn = (create_model(name) for name in ("vit_micro", "resnet_micro"))
    model = LateFusion(cnn.cnn, vit, Silent, img_size=32)
    with pytest.raises(InputError, match="cannot follow a Silent: it has no attention; take --method gradcam"):
        attention_rollout(model, images(32, 32))


def test_a_model_whose_tokens_do_not_stay():
    with pytest.raises(InputError, match="convolutions between its stages mix places"):
        attention_rollout(create_model("cmt_micro"), images(32, 32))
