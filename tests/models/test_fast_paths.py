"""The papers' faster formulations compute what the plain ones do."""

import copy

import pytest
import torch
from torch import nn

from tokenfusion.layers import fast
from tokenfusion.layers.cross_attention import ClsCrossAttention
from tokenfusion.layers.fast import attend_mixed_in_training
from tokenfusion.models.crossvit_fusion import Branch, CrossAttentionFusion, Rates
from tokenfusion.models.deepvit import BatchNormMixing, ReAttention


def plain_re_attention(mixing, maps, values):
    """As published: 1×1 convolution, BatchNorm2d, product with the values."""
    return (mixing.norm(mixing.matrix(maps)) * mixing.scale) @ values


def random_mixing(heads, scale=1.0, momentum=0.1):
    mixing = BatchNormMixing(heads, scale)
    mixing.norm = nn.BatchNorm2d(heads, momentum=momentum)
    nn.init.normal_(mixing.norm.weight)
    nn.init.normal_(mixing.norm.bias)
    return mixing


def fast_re_attention(mixing, maps, values):
    return attend_mixed_in_training(mixing.matrix, mixing.norm, mixing.scale, maps, values)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_batch_norm_mixing_trains_as_convolution_and_batch_norm_do(momentum, dropped):
    torch.manual_seed(0)
    ours = random_mixing(5, scale=0.3, momentum=momentum).double().train()
    plain = copy.deepcopy(ours)
    for step in range(2):
        logits = torch.randn(3, 5, 7, 7, dtype=torch.float64) * (step + 1)
        values, weights = torch.randn(2, 3, 5, 7, 4, dtype=torch.float64)
        mask = (torch.rand(3, 5, 7, 7) >= dropped) / (1 - dropped)
        results = []
        for attend, mixing in ((fast_re_attention, ours), (plain_re_attention, plain)):
            inputs = logits.clone().requires_grad_(), values.clone().requires_grad_()
            output = attend(mixing, inputs[0].softmax(-1) * mask, inputs[1])
            (output * weights).sum().backward()
            results.append([output.detach(), *(tensor.grad for tensor in inputs)])
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)
    for (key, parameter), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-10, msg=key)
    assert ours.matrix.bias.grad.abs().max() == 0  # exactly, where the plain way leaves rounding errors
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()), rtol=1e-12, atol=1e-12)
    assert ours.norm.num_batches_tracked == 2


@pytest.mark.parametrize("spread", [0.02, 0.15, 1.0, 8.0])  # from nearly uniform maps to peaked ones
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_statistics_are_no_less_exact_than_batch_norms(spread, dtype):
    torch.manual_seed(0)
    mixing, logits = random_mixing(12), spread * torch.randn(2, 12, 197, 197)
    values, weights = torch.randn(2, 2, 12, 197, 8)
    exact, errors = None, []
    for attend, kind in (
        (plain_re_attention, torch.float64),
        (fast_re_attention, dtype),
        (plain_re_attention, dtype),
    ):
        module = copy.deepcopy(mixing).to(torch.promote_types(kind, torch.float32)).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            output = attend(module, logits.to(kind).softmax(-1), values.to(kind))
        (output * weights).sum().backward()
        results = [output, module.norm.running_var, module.matrix.weight.grad, module.norm.weight.grad]
        exact = exact or results
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)])
    floor = 5e-6 if dtype == torch.float32 else 0.01
    for ours, plains in zip(*errors[1:], strict=True):
        assert ours <= max(2 * plains, floor)


class ElsewhereToo(nn.modules.batchnorm._BatchNorm):
    """Stands for a norm whose statistics are not those of this process's batch alone."""

    def _check_input_dim(self, maps):
        pass

    def forward(self, maps):
        return super().forward(torch.cat([maps, torch.zeros_like(maps)]))[: len(maps)]


@pytest.mark.parametrize("kind", ["own", "frozen", "of other batches too"])
def test_re_attention_learns_the_same_by_either_way(kind):
    torch.manual_seed(0)
    attention, tokens = ReAttention(36, 3, random_mixing(3)).double().train(), torch.randn(2, 6, 36).double()
    if kind == "frozen":
        attention.mixing.norm.eval()
    elif kind != "own":
        attention.mixing.norm = ElsewhereToo(3).double()
    explicit = copy.deepcopy(attention)
    explicit.fused_attn = False
    torch.testing.assert_close(attention(tokens), explicit(tokens))
    torch.testing.assert_close(dict(attention.named_buffers()), dict(explicit.named_buffers()))
    assert (kind == "frozen") == torch.equal(attention.mixing.norm.running_mean, torch.zeros(3).double())


def test_a_batch_in_parts_gives_what_it_gives_at_once(monkeypatch):
    torch.manual_seed(0)
    attention, tokens = ReAttention(36, 3, random_mixing(3)).eval(), torch.randn(5, 7, 36)
    monkeypatch.setattr(fast, "MAPS_IN_CACHE", 2 * 3 * 7 * 7)
    sizes = []
    attention.attn_drop.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    with torch.no_grad():
        in_parts = attention(tokens)
        attention.fused_attn = False
        torch.testing.assert_close(attention(tokens), in_parts)
    torch.testing.assert_close(attention(tokens), in_parts)  # with gradients too
    assert sizes == [2, 2, 1, 5, 5]


def test_an_image_in_parts_gives_what_it_gives_at_once(monkeypatch):
    torch.manual_seed(0)
    attention, tokens = ReAttention(36, 3, random_mixing(3)).eval(), torch.randn(2, 7, 36)
    monkeypatch.setattr(fast, "MAPS_IN_CACHE", 0)
    monkeypatch.setattr(fast, "MAPS_IN_MEMORY", 3 * 3 * 7)  # three queries of all heads
    shapes = []
    attention.attn_drop.register_forward_hook(lambda _module, inputs, _output: shapes.append(tuple(inputs[0].shape)))
    with torch.no_grad():
        in_parts = attention(tokens)
    torch.testing.assert_close(attention(tokens), in_parts)
    assert shapes == [(1, 3, 3, 7), (1, 3, 3, 7), (1, 3, 1, 7)] * 2 + [(2, 3, 7, 7)]


def test_a_norm_that_alone_trains_sees_the_whole_batch(monkeypatch):
    """As statistics are moved to new images: the model in evaluation, its norms not, no gradients."""
    torch.manual_seed(0)
    attention, tokens = ReAttention(36, 3, random_mixing(3)).eval(), torch.randn(5, 7, 36)
    attention.mixing.norm.train()
    explicit = copy.deepcopy(attention)
    explicit.fused_attn = False
    monkeypatch.setattr(fast, "MAPS_IN_CACHE", 2 * 3 * 7 * 7)
    with torch.no_grad():
        torch.testing.assert_close(attention(tokens), explicit(tokens))
    torch.testing.assert_close(dict(attention.named_buffers()), dict(explicit.named_buffers()))


def test_cross_attention_without_projected_tokens_is_the_paper_s():
    torch.manual_seed(0)
    attention, tokens = ClsCrossAttention(24, 3).double().eval(), torch.randn(2, 9, 24, dtype=torch.float64)
    for layer in (attention.q, attention.k, attention.v):
        nn.init.normal_(layer.bias)
        nn.init.normal_(layer.weight, std=0.3)
    attention.attend.fused_attn = False
    maps = []
    attention.attend.attn_drop.register_forward_hook(lambda _module, inputs, _output: maps.append(inputs[0]))
    with torch.no_grad():
        inferred = attention(tokens)
    torch.testing.assert_close(inferred, attention(tokens), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-12, atol=1e-12)
    assert maps[0].std() > 0.05  # not a flat map, which would hide a wrong key


def test_cross_attention_infers_in_full_precision_under_autocast():
    torch.manual_seed(0)
    fusion = CrossAttentionFusion(Branch(24, 3, 2.0), Branch(40, 5, 2.0), Rates(), 0.0).eval()
    small, large, grids = torch.randn(2, 10, 24), torch.randn(2, 5, 40), ((3, 3), (2, 2))
    with torch.no_grad():
        exact = fusion(small, large, grids)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(fusion(small, large, grids), exact, rtol=0, atol=0)
