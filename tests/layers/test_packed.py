"""A packed model answers as the model does, to the bit, and keeps what its weights were."""

import pytest
import timm
import torch

import tokenfusion  # noqa: F401  # registers its models with timm
from tokenfusion.hardware import autocast
from tokenfusion.layers.packed import PackedLinear, pack

MODELS = ("crossvit_micro", "deepvit_micro", "cmt_micro", "tokenfusion_layerwise_micro", "resnet18")
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def as_if_trained(name):
    """A model whose norms have learned something, channels-last."""
    model = timm.create_model(name, num_classes=5)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight, 1, 0.3)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return model.to(memory_format=torch.channels_last).eval()


@torch.inference_mode()
def logits(model, images, precision):
    with autocast(images.device, precision):
        return model(images)


def images_for(model, count):
    return torch.randn(count, 3, *model.default_cfg["input_size"][1:]).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_answers_to_the_bit(name, precision):
    model = as_if_trained(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    packed = pack(model, KINDS[precision])
    for count in (1, 3):  # CMT folds where a map has more pixels than channels
        images = images_for(model, count)
        assert torch.equal(logits(packed, images, precision), logits(model, images, precision))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_packed_model_does_not_see_what_becomes_of_the_weights():
    model = as_if_trained("cmt_micro")
    images, packed = images_for(model, 2), pack(model, torch.bfloat16)
    if packed is model:
        pytest.skip("this CPU has no AVX-512, where nothing is packed for bfloat16")
    before = logits(packed, images, "bf16")
    with torch.no_grad():
        for parameter in model.stages.parameters():
            if parameter.ndim == 2:
                parameter.zero_()
    assert torch.equal(logits(packed, images, "bf16"), before)
    assert not torch.equal(logits(model, images, "bf16"), before)


def test_a_packed_layer_outside_autocast_is_the_layer_itself():
    layer, rows = torch.nn.Linear(9, 7), torch.randn(5, 9)
    with torch.inference_mode():
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            assert torch.equal(PackedLinear(layer)(rows), layer(rows))
