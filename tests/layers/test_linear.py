"""The linear layer's faster ways give what `nn.Linear` gives, and notice when its weight changes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenfusion.layers.linear import ONEDNN, WORTHWHILE, Linear

onednn_only = pytest.mark.skipif(not ONEDNN, reason="oneDNN is asked on CPUs with AVX-512 only")
ROWS, INPUTS, OUTPUTS = (3, 71), 130, 211  # more multiply-adds than WORTHWHILE


def layer_and_input(bias=True):
    torch.manual_seed(0)
    return Linear(INPUTS, OUTPUTS, bias=bias), torch.randn(*ROWS, INPUTS)


def reference(layer, x, dtype=torch.float32):
    """What PyTorch's own layer gives; by hand in bfloat16, because autocast itself does not see a weight change."""
    with torch.autocast("cpu", enabled=False):
        return F.linear(*(None if tensor is None else tensor.to(dtype) for tensor in (x, layer.weight, layer.bias)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_outputs_and_gradients_are_those_of_pytorch(bias, transposed):
    layer, x = layer_and_input(bias)
    if transposed:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert x.numel() * OUTPUTS >= WORTHWHILE
    inputs = [x.requires_grad_(), *layer.parameters()]
    weights = torch.randn(*ROWS, OUTPUTS)
    output, expected = layer(x), reference(layer, x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    for gradient, other in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_those_of_pytorch():
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


def by_assignment(layer):
    layer.weight.data = layer.weight.data + 1


def by_a_state_dict(layer):
    layer.load_state_dict({"weight": layer.weight + 1, "bias": layer.bias - 1})


def in_place(layer):
    layer.bias.add_(1)


def by_an_optimizer(layer):
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=1.0).step()


def behind_its_back_while_training(layer):
    layer.train()
    layer.weight.data.mul_(2)  # which leaves the version as it was
    layer.eval()


@onednn_only  # elsewhere the cast is autocast's, which does not look at the weight again
@pytest.mark.parametrize(
    "change", [by_assignment, by_a_state_dict, in_place, by_an_optimizer, behind_its_back_while_training]
)
def test_bfloat16_inference_sees_a_weight_that_changed(change):
    layer, x = layer_and_input()
    layer.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        for _ in range(2):
            change(layer)
            after = layer(x)
            assert torch.equal(after, copy.deepcopy(layer)(x))
            torch.testing.assert_close(after, reference(layer, x, torch.bfloat16), rtol=0.02, atol=0.02)
            assert (after - before).abs().mean() > 0.1
            before = after


@onednn_only
def test_bfloat16_inference_of_copies_is_their_own():
    layer, x = layer_and_input()
    layer.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), before)
            other.weight.add_(1)
            assert not torch.equal(other(x), before)
            assert torch.equal(layer(x), before)


@onednn_only
def test_weights_made_in_inference_mode_are_seen_to_change_too():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        layer, x = layer_and_input()
        before = layer.eval()(x)
        layer.weight.add_(1)
        torch.testing.assert_close(layer(x), reference(layer, x, torch.bfloat16), rtol=0.02, atol=0.02)
        assert not torch.equal(layer(x), before)


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
