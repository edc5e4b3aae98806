"""The papers' models compute what the official code computes."""

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import NAMES, golden, golden_images, official_state
from torch.utils.flop_counter import FlopCounterMode

from tokenfusion import weights
from tokenfusion.models import cmt, crossvit, deepvit

VARIANTS = crossvit.OFFICIAL | deepvit.OFFICIAL | cmt.OFFICIAL
# name: parameters in millions, billions of multiply-adds as measured on the official code (for CrossViT without the
# products inside self-attention), and as the paper of CrossViT publishes them
COSTS = {
    "crossvit_tiny_224": (7.01, 1.30, 1.6),
    "crossvit_small_224": (26.86, 5.09, 5.6),
    "crossvit_base_224": (105.03, 20.13, 21.2),
    "crossvit_9_224": (8.55, 1.55, 1.8),
    "crossvit_15_224": (27.53, 5.17, 5.8),
    "crossvit_18_224": (43.27, 8.21, 9.0),
    "crossvit_9_dagger_224": (8.78, 1.68, 2.0),
    "crossvit_15_dagger_224": (28.21, 5.50, 6.1),
    "crossvit_18_dagger_224": (44.27, 8.65, 9.5),
    "crossvit_15_dagger_384": (28.50, 16.07, 21.4),
    "crossvit_18_dagger_384": (44.61, None, 32.4),
    "deepvit_16": (24.43, 5.27, None),
    "deepvit_24": (36.26, None, None),
    "deepvit_32": (48.10, None, None),
    "deepvit_s": (27.31, 6.36, None),
    "deepvit_l": (58.88, None, None),
    "deepvit_l_384": (59.04, None, None),
    "cmt_ti": (9.49, None, None),
    "cmt_xs": (15.25, None, None),
    "cmt_s": (26.26, 4.03, None),
    "cmt_b": (45.72, None, None),
}


def with_golden_weights(name, dtype=torch.float64):
    model = timm.create_model(name).to(dtype)
    weights.load_weights(model, official_state(name))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_has_the_official_keys_and_shapes(name):
    state = weights.to_official(timm.create_model(name))
    assert {key: list(value.shape) for key, value in state.items()} == golden(name)["shapes"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_logits(name, dtype, tolerance):
    expected = golden(name)
    model = with_golden_weights(name, dtype).eval()
    with torch.no_grad():
        logits = model(golden_images(expected["image_size"]).to(dtype))
    difference = logits.double() - torch.tensor(expected["logits"], dtype=torch.float64)
    assert difference.abs().max() < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_training_loss_and_gradients(name):
    expected = golden(name)
    model = with_golden_weights(name).train()
    loss = F.cross_entropy(model(golden_images(expected["image_size"])), torch.tensor([1, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(expected["train_loss"], abs=1e-8)
    official = model.official_names.official
    norms = {official(key): p.grad if p.grad is None else p.grad.norm().item() for key, p in model.named_parameters()}
    assert norms == {
        key: norm if norm is None else pytest.approx(norm, abs=1e-6) for key, norm in expected["grad_norm"].items()
    }


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval().requires_grad_(False)


def giga_macs(model, image):
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_cost(name):
    model = timm.create_model(name)
    parameters, measured, published = COSTS[name]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6 == pytest.approx(parameters, abs=0.0051)
    model = on_meta(name)
    total = giga_macs(model, torch.empty(1, 3, *model.img_size, device="meta"))
    if published is not None:
        assert total == pytest.approx(published, abs=0.051)
        total -= self_attention_giga_macs(model)
    if measured is not None:
        assert total == pytest.approx(measured, rel=0.01)


def self_attention_giga_macs(model):
    """Of a CrossViT's blocks: q kᵀ and the map times v, 2 N² C."""
    branches = (model.embed_small, model.stages[0].small), (model.embed_large, model.stages[0].large)
    cost = 0
    for embed, blocks in branches:
        _, tokens, dim = embed.positions.table.shape
        cost += 2 * tokens**2 * dim * len(blocks) * len(model.stages)
    return cost / 1e9


@pytest.mark.parametrize("name", crossvit.OFFICIAL)
def test_crossvit_and_timms_hold_the_same_weights(name):
    twin_name = name.replace("_224", "_240").replace("_384", "_408")
    twin = on_meta(twin_name)
    state = {key.replace("_0", ".0").replace("_1", ".1"): value.shape for key, value in twin.state_dict().items()}
    assert {key: value.shape for key, value in weights.to_official(on_meta(name)).items()} == state


@pytest.mark.parametrize("name", ["crossvit_tiny_224", "crossvit_9_dagger_224"])
def test_crossvit_computes_what_timms_does(name):
    torch.manual_seed(3)
    twin = timm.create_model(name.replace("_224", "_240"), num_classes=11).eval()
    model = timm.create_model(name, num_classes=11).eval()
    loaded = weights.load_weights(model, twin.state_dict())
    images = torch.randn(2, 3, 240, 240)
    with torch.no_grad():
        torch.testing.assert_close(model(images), twin(images), rtol=0, atol=1e-5)
    assert loaded == weights.LoadedWeights()


def test_crossvit_sees_other_sizes_at_their_own_scale():
    model = timm.create_model("crossvit_9_224")
    assert model.scale_small.grid(240, 480) == (20, 40)
    assert model.scale_large.grid(240, 480) == (14, 28)
    assert timm.create_model("crossvit_15_dagger_384").scale_large.grid(408, 408) == (24, 24)


def test_an_unknown_choice_offers_the_nearest():
    with pytest.raises(ValueError, match=r"fusion='cross_atention' is not known; did you mean 'cross_attention'"):
        timm.create_model("crossvit_9_224", fusion="cross_atention")
