"""The papers' models compute what the official code computes."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import NAMES, golden, golden_images, official_state

from tokenfusion import weights
from tokenfusion.models import crossvit


def build(name):
    """The model that the golden values are of: at their size, and of their classes where these are not 1,000."""
    expected = golden(name)
    return timm.create_model(name, img_size=expected["image_size"], num_classes=expected.get("num_classes", 1000))


@pytest.fixture(scope="module", params=NAMES)
def in_float64(request):
    """A model's name, and the model in float64 with the weights that the golden values are of."""
    model = build(request.param).double()
    weights.load_weights(model, official_state(model))
    return request.param, model


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_has_the_official_keys_and_shapes(name):
    with torch.device("meta"):
        model = build(name)
    state = weights.to_official(model)
    assert {key: list(value.shape) for key, value in state.items()} == golden(name)["shapes"]
    assert sum(parameter.numel() for parameter in model.parameters()) == golden(name)["params"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_logits(in_float64, dtype, tolerance):
    name, model = in_float64
    expected = golden(name)
    model = copy.deepcopy(model).to(dtype).eval()
    with torch.no_grad():
        logits = model(golden_images(expected["image_size"]).to(dtype))
    difference = logits.double() - torch.tensor(expected["logits"], dtype=torch.float64)
    assert difference.abs().max() < tolerance


def test_training_loss_and_gradients(in_float64):
    name, model = in_float64
    expected = golden(name)
    model = copy.deepcopy(model).train()
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
