"""Branch dropout: while a fused model trains, an image may be without its patches or without its pixels."""

import pytest
import torch

from tokenfusion import create_model
from tokenfusion.models.exchange import PixelSource, draw_branches

STRATEGIES = ["late", "early", "layerwise"]


def met(model, images):
    """Patches (B, N, C) as the transformer's first block or the first exchange is given them, and all pixels met."""
    patches, pixels = [], []
    first = model.get_submodule(model.entrance(model.img_size)[0])
    hooks = [first.register_forward_pre_hook(lambda _, inputs: patches.append(inputs[0][:, 1:17]))]
    sources = [module for module in model.modules() if isinstance(module, PixelSource)]
    hooks += [source.register_forward_hook(lambda *given: pixels.append(given[2])) for source in sources]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    return logits, patches[0], torch.cat(pixels, dim=1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_image_loses_one_kind_of_tokens_and_never_both(strategy):
    torch.manual_seed(0)
    model = create_model(f"tokenfusion_{strategy}_micro").train()
    model.branch_dropout = 1.0
    _, patches, pixels = met(model, torch.randn(24, 3, 32, 32))
    without_patches, without_pixels = ((tokens == 0).all(2) for tokens in (patches, pixels))
    assert torch.equal(without_patches, without_patches[:, :1].expand_as(without_patches))  # all of them, or none
    assert torch.equal(without_pixels, without_pixels[:, :1].expand_as(without_pixels))
    assert torch.equal(without_patches[:, 0], ~without_pixels[:, 0])
    assert 0 < without_pixels[:, 0].sum() < 24


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_missing_says_nothing(strategy):
    """Without its pixels, an image is what its patches are, whatever the CNN sees."""
    model = create_model(f"tokenfusion_{strategy}_micro", gate=1.0).train()
    model.branch_dropout = 1.0
    images, outputs = torch.randn(24, 3, 32, 32), []
    for _ in range(2):
        torch.manual_seed(0)
        logits, _, pixels = met(model, images)
        outputs.append(logits)
        with torch.no_grad():
            for parameter in model.cnn.parameters():
                parameter.add_(torch.randn_like(parameter))
    same = (outputs[0] - outputs[1]).abs().amax(1) < 1e-6
    missing = (pixels == 0).all(2).all(1)
    assert torch.equal(same, missing)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_dropped_in_evaluation(strategy):
    model = create_model(f"tokenfusion_{strategy}_micro").eval()
    images = torch.randn(4, 3, 32, 32)
    whole = model(images)
    model.branch_dropout = 1.0
    assert torch.equal(model(images), whole)


def test_a_kept_token_vote_is_without_one_side_too():
    model = create_model("fuse(resnet_micro,vit_micro,probe)", num_classes=3).train()
    model.drop.p, model.branch_dropout = 0.0, 1.0
    torch.nn.init.normal_(model.votes.weight)
    seen = []
    model.operator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model(torch.randn(16, 3, 32, 32))
    (x, p, _), grid = seen[0], model.cells(model.img_size)
    nothing = [
        source.norm(source.proj.bias) + source.positions(grid) for source in (model.token_source, model.pixel_source)
    ]
    no_tokens, no_pixels = (
        torch.isclose(tokens, blank, atol=1e-6).all(2).all(1) for tokens, blank in zip((x, p), nothing, strict=True)
    )
    assert torch.equal(no_tokens, ~no_pixels)
    assert 0 < no_tokens.sum() < 16


def test_shares():
    torch.manual_seed(0)
    patches, pixels = draw_branches(torch.zeros(20_000, 1), 0.3)
    assert patches.mean().item() == pytest.approx(0.85, abs=0.01)
    assert pixels.mean().item() == pytest.approx(0.85, abs=0.01)
    assert (patches + pixels).min() == 1
    assert torch.equal(*(kept[:5] for kept in draw_branches(torch.zeros(5, 1), 0.0)))
