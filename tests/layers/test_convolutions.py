"""The convolutions' faster ways give what `nn.Conv2d` gives, in outputs and gradients."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenfusion.layers.blocks import DepthwisePool, pad_to_multiple
from tokenfusion.layers.fast_maps import PointwiseConv
from tokenfusion.models.cmt_blocks import InvertedResidualFeedForward

LAYOUTS = [torch.channels_last, torch.contiguous_format]


class PaddedFirst(nn.Conv2d):
    """PyTorch's convolution over a map padded to whole cells."""

    def forward(self, features):
        return super().forward(pad_to_multiple(features, self.stride[0]))


def pair(kind):
    """A layer of ours, PyTorch's with the same weights, and the number of channels that they take."""
    torch.manual_seed(0)
    if kind == "pointwise":
        ours, plain = PointwiseConv(6, 5), nn.Conv2d(6, 5, 1)
    else:
        cell = int(kind.removeprefix("pool "))
        ours, plain = DepthwisePool(6, cell), PaddedFirst(6, 6, cell, stride=cell, groups=6)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def results_of(layer, images, autocast=False):
    """Output and gradients, by name."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(images)
    weights = torch.arange(output.numel()).view_as(output) / output.numel() - 0.3
    (output * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "images": images.grad, **gradients}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 6, 8, 12), (1, 6, 7, 9), (3, 6, 1, 1)])
@pytest.mark.parametrize("kind", ["pointwise", "pool 2", "pool 3", "pool 8"])
def test_outputs_and_gradients_are_pytorchs(kind, size, layout):
    ours, plain = pair(kind)
    images = torch.randn(size, dtype=torch.float64).contiguous(memory_format=layout)
    expected = results_of(plain.double(), images)
    torch.testing.assert_close(results_of(ours.double(), images), expected, rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), expected["output"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["pointwise", "pool 2"])
def test_second_derivatives_are_right(kind):
    ours, _ = pair(kind)
    images = torch.randn(2, 6, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    assert torch.autograd.gradgradcheck(ours.double(), (images.requires_grad_(),))


@pytest.mark.parametrize("kind", ["pointwise", "pool 4"])
def test_under_autocast_errors_are_no_larger_than_pytorchs(kind):
    ours, plain = pair(kind)
    images = torch.randn(4, 6, 16, 16).contiguous(memory_format=torch.channels_last)
    found, theirs = results_of(ours, images, autocast=True), results_of(plain, images, autocast=True)
    exact = results_of(plain.double(), images.double())
    for name, tensor in exact.items():
        assert found[name].dtype == theirs[name].dtype
        errors = [(side[name].double() - tensor).norm() / tensor.norm() for side in (found, theirs)]
        assert errors[0] <= max(1.5 * errors[1], 1e-6)


def test_a_pool_that_trains_in_bfloat16_takes_no_convolution_backwards():
    ours, _ = pair("pool 4")
    output = ours(torch.randn(2, 6, 8, 8).contiguous(memory_format=torch.channels_last))
    assert "PoolCells" in type(output.grad_fn).__name__


@pytest.mark.parametrize("kind", ["pointwise", "pool 2"])
def test_costs_are_counted(kind):
    totals = []
    for layer in pair(kind):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(2, 6, 4, 4).contiguous(memory_format=torch.channels_last))
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def feed_forward(dim=6):
    """CMT's feed-forward part with norms that have seen much."""
    torch.manual_seed(0)
    part = InvertedResidualFeedForward(dim, 4 * dim).double().eval()
    for norm in part.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for vector in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(vector)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return part


@pytest.mark.parametrize("size", [(2, 6, 5, 7), (1, 6, 1, 30), (1, 6, 30, 1), (40, 6, 1, 1), (1, 6, 3, 3)])
def test_norms_folded_into_convolutions_change_nothing_at_edges_and_corners_either(size):
    part, images = feed_forward(), torch.randn(size, dtype=torch.float64)
    images = images.contiguous(memory_format=torch.channels_last)
    expected = part(images)  # gradients are wanted, so that it goes through its modules
    with torch.inference_mode():
        torch.testing.assert_close(part(images), expected.detach(), rtol=1e-10, atol=1e-10)


def test_what_is_folded_follows_the_weights_whatever_changes_them():
    part = feed_forward()
    images = torch.randn(1, 6, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    for tensor in [*part.parameters(), *(norm.running_var for norm in part.modules() if hasattr(norm, "running_var"))]:
        with torch.no_grad():
            before = part(images)
            tensor.data.mul_(1.5)
            after = part(images)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, part(images).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("where", ["expand.2", "conv", "norm.1", "project"])
def test_a_part_that_is_watched_or_that_trains_is_called(where):
    part = feed_forward()
    images = torch.randn(2, 6, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    seen = []
    handle = part.get_submodule(where).register_forward_hook(lambda *_: seen.append(where))
    with torch.no_grad():
        part(images)
        assert seen == [where]
        handle.remove()
        part(images)
        assert seen == [where]
        part.norm[1].train()
        before = part.norm[1].running_mean.clone()
        part(images)
    assert not torch.equal(part.norm[1].running_mean, before)


def test_folding_in_bfloat16_is_about_as_exact():
    part = feed_forward(32).float()
    images = torch.randn(8, 32, 14, 14).contiguous(memory_format=torch.channels_last)
    errors = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        folded = part(images)
        handle = part.conv.register_forward_hook(lambda *_: None)
        plain = part(images)
        handle.remove()
        with torch.autocast("cpu", enabled=False):
            exact = part.double()(images.double())
    errors = [((found.double() - exact).norm() / exact.norm()).item() for found in (folded, plain)]
    assert not torch.equal(folded, plain)
    assert errors[0] <= 1.3 * errors[1]


def test_norms_in_full_precision_fold_into_no_weights_of_half():
    torch.manual_seed(0)
    block = InvertedResidualFeedForward(6, 12).bfloat16().eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    images = torch.randn(2, 6, 7, 5).bfloat16().to(memory_format=torch.channels_last)
    with torch.no_grad():
        quick = block(images)
    torch.testing.assert_close(quick, block(images), atol=0.05, rtol=0.05)
