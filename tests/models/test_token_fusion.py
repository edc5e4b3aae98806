"""Facts about the three fusion strategies."""

import pytest
import torch

import tokenfusion
from tokenfusion.layers.tokens import TokenGroup, num_prefix_tokens
from tokenfusion.models.token_fusion import LayerwiseFusion, PatchesToPixels, PixelsToPatches

STRATEGIES = ("late", "early", "layerwise")
TINY = {
    "dim": 24, "heads": 3, "mlp_ratio": 2.0, "patch_size": 4, "stem": 8, "conv_strides": (1, 2, 2),
    "conv_dims": (12, 20), "conv_depths": (1, 1), "img_size": 16, "num_classes": 3,
}  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [(32, 32), (29, 50)])
def test_the_layout_describes_the_tokens_there_are(strategy, size):
    model = tokenfusion.create_model(f"tokenfusion_{strategy}_micro").eval()
    with torch.no_grad():
        tokens = model.forward_features(torch.randn(1, 3, *size))
    layout = model.token_layout(size)
    assert sum(group.count for group in layout) == tokens.shape[1]
    assert num_prefix_tokens(layout) == 1
    assert layout[0] == TokenGroup("cls")
    assert [group.source for group in layout[1:]] == (["patch"] if strategy == "layerwise" else ["patch", "pixel"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_branches_reach_the_logits(strategy):
    torch.manual_seed(0)
    model = tokenfusion.create_model(f"tokenfusion_{strategy}_micro").eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        whole = model(image)
        for branch in (model.cnn.stem.conv, model.patches):
            handle = branch.register_forward_hook(lambda _m, _i, output: torch.zeros_like(output))
            assert not torch.allclose(model(image), whole)
            handle.remove()


def test_closed_gates_leave_the_transformer_alone():
    torch.manual_seed(0)
    fused = LayerwiseFusion(depth=4, gate=0.0, **TINY).eval()
    images = torch.randn(2, 3, 19, 27)
    with torch.no_grad():
        tokens = fused.embed_patches(images)
        for block in fused.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(fused.forward_features(images), fused.norm(tokens), rtol=0, atol=1e-6)


def test_closed_gates_leave_the_cnn_alone():
    torch.manual_seed(0)
    fused = LayerwiseFusion(depth=4, gate=0.0, **TINY).eval()
    images = torch.randn(2, 3, 19, 27)
    maps = []
    fused.cnn.stages[-1].register_forward_hook(lambda _m, _i, output: maps.append(output))
    with torch.no_grad():
        fused(images)
        fused.cnn(images)
    assert torch.equal(maps[0], maps[1])


def test_an_exchange_keeps_places():
    """A pixel changes the one patch that it lies in, and a patch the pixels that it covers."""
    torch.manual_seed(0)
    to_patches, to_pixels = PixelsToPatches(5, 7, gate=1.0), PatchesToPixels(7, 5, gate=1.0)
    feature_map, tokens, grid = torch.randn(1, 5, 6, 4), torch.randn(1, 1 + 6, 7), (3, 2)
    with torch.no_grad():
        changed = feature_map.clone()
        changed[0, :, 5, 1] += 1  # row 5, column 1 of 6×4 lies in row 2, column 0 of 3×2: patch 4, token 5
        moved = (to_patches(changed, tokens, grid) - to_patches(feature_map, tokens, grid)).abs().sum(-1)[0]
        assert moved.nonzero().flatten().tolist() == [5]
        changed = tokens.clone()
        changed[0, 5] += torch.randn(7)
        moved = (to_pixels(changed, feature_map, grid) - to_pixels(tokens, feature_map, grid)).abs().sum(1)[0]
        assert moved.nonzero().tolist() == [[4, 0], [4, 1], [5, 0], [5, 1]]


def test_depth_that_does_not_spread_over_the_stages_is_refused():
    with pytest.raises(tokenfusion.InputError, match=r"depth=5 does not spread over 2 CNN stages; try 4"):
        LayerwiseFusion(depth=5, **TINY)


def test_unknown_names_get_the_nearest():
    with pytest.raises(tokenfusion.InputError, match="did you mean tokenfusion_early_micro"):
        tokenfusion.create_model("tokenfusion_earli_micro")


def test_unknown_arguments_are_refused():
    with pytest.raises(tokenfusion.InputError, match="widht"):
        tokenfusion.create_model("tokenfusion_early_micro", widht=3)


def test_patterns_choose_names():
    assert tokenfusion.list_models("*early_[mt]*") == ["tokenfusion_early_micro", "tokenfusion_early_tiny"]
