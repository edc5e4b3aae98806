"""The linear layer's faster ways give what `nn.Linear` gives, and notice when its weight changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenfusion.layers import fast
from tokenfusion.layers.fast import WORTHWHILE, Linear, OneDNNLinear

ROWS, INPUTS, OUTPUTS = (3, 71), 130, 211  # more multiply-adds than WORTHWHILE


def layer_and_input(bias=True):
    torch.manual_seed(0)
    return Linear(INPUTS, OUTPUTS, bias=bias), torch.randn(*ROWS, INPUTS)


def reference(layer, x, dtype=torch.float32):
    """What PyTorch's own layer gives; by hand in bfloat16, because autocast itself does not see a weight change."""
    with torch.autocast("cpu", enabled=False):
        return F.linear(*(None if tensor is None else tensor.to(dtype) for tensor in (x, layer.weight, layer.bias)))


@pytest.fixture(params=[True, False])
def onednn(request, monkeypatch):
    """Linear layers by oneDNN, whatever the CPU, and by PyTorch."""
    monkeypatch.setattr(fast, "ONEDNN", request.param)
    return request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_outputs_and_gradients_are_those_of_pytorch(onednn, bias, transposed):
    layer, x = layer_and_input(bias)
    if transposed:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert x.numel() * OUTPUTS >= WORTHWHILE
    inputs = [x.requires_grad_(), *layer.parameters()]
    weights = torch.randn(*ROWS, OUTPUTS)
    output, expected = layer(x), reference(layer, x)
    assert (OneDNNLinear.__name__ in str(output.grad_fn.next_functions)) == onednn
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    for gradient, other in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_those_of_pytorch(onednn):  # noqa: ARG001
    layer, x = layer_and_input()
    seconds = []
    for forward in (layer, lambda x: reference(layer, x)):
        (first,) = torch.autograd.grad(forward(x.requires_grad_()).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), layer.weight)[0])
    torch.testing.assert_close(seconds[0], seconds[1], rtol=1e-4, atol=1e-2)


def test_its_cost_is_counted():
    layer, x = layer_and_input()
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 3 * 71 * INPUTS * OUTPUTS


def through_data(layer):
    layer.weight.data.add_(1)  # which leaves the version as it was


def by_assignment(layer):
    layer.weight.data = layer.weight.data + 1


def by_set(layer):
    layer.weight.set_(layer.weight + 1)


def by_a_state_dict(layer):
    layer.load_state_dict({"weight": layer.weight + 1, "bias": layer.bias - 1})


def by_an_assigned_state_dict(layer):
    layer.load_state_dict({"weight": layer.weight + 1, "bias": layer.bias - 1}, assign=True)


def in_place(layer):
    layer.bias.add_(1)


def by_an_optimizer(layer):
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=1.0).step()


def by_an_average(layer):
    other = copy.deepcopy(layer)
    in_place(other)
    by_assignment(other)
    average = ModelEmaV3(layer, decay=0.5)
    average.update(other, step=1)
    average.update(other, step=2)
    layer.load_state_dict(average.module.state_dict())


def while_training(layer):
    layer.train()
    layer.weight.data.mul_(2)
    layer.eval()


CHANGES = [
    *(through_data, by_assignment, by_set, by_a_state_dict, by_an_assigned_state_dict, in_place),
    *(by_an_optimizer, by_an_average, while_training),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_bfloat16_inference_sees_a_weight_that_changed(change, mode):
    layer, x = layer_and_input()
    layer.eval()
    before = None
    with torch.autocast("cpu", torch.bfloat16):  # one context all along: its own cache would not see the change either
        for _ in range(3):
            with mode():
                after = layer(x)
            torch.testing.assert_close(after, reference(layer, x, torch.bfloat16), rtol=0.02, atol=0.02)
            assert before is None or (after - before).abs().mean() > 0.1
            before = after
            with torch.no_grad():
                change(layer)


def test_gradients_under_autocast_after_inference_are_pytorchs():
    layer, x = layer_and_input()
    plain = nn.Linear(INPUTS, OUTPUTS)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    for module in (layer, plain):
        with torch.autocast("cpu", torch.bfloat16):
            module(x).float().square().sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)
