"""A linear layer on the faster of the two libraries that PyTorch has for matrix products on a CPU.

For float32 PyTorch asks MKL, which leaves AVX-512 idle on processors that are not Intel's. oneDNN, which PyTorch asks
for convolutions and for bfloat16, does not: there it is the faster one (benchmarks/linear.py).

Letters: M rows, K inputs, O outputs.
"""

from collections.abc import MutableMapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

ONEDNN = torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability() == "AVX512"
WORTHWHILE = 2**21  # multiply-adds; below, calling oneDNN in float32 costs more than it gains


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x wᵀ + b by oneDNN, without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def count_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """What PyTorch's FLOP counter is to count for `onednn_linear`."""
    return 2 * x.numel() * weight[0]


if ONEDNN:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(count_flops)


class OneDNNLinear(torch.autograd.Function):
    """x wᵀ + b in float32, for x (M, K), w (O, K) and b (O,) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            OneDNNLinear.apply(gradient, weight.t(), None) if wants_x else None,
            OneDNNLinear.apply(gradient.t(), x.t(), None) if wants_weight else None,
            gradient.sum(0) if wants_bias else None,
        )


class Packed(NamedTuple):
    """A layer's weight and bias in bfloat16, the weight in the order that oneDNN wants, and what they were cast from.

    Attributes:
        source: the parameters' data, held so that no other tensor comes to lie at their address.
        state: the address and the version of either.
    """

    weight: Tensor
    bias: Tensor | None
    source: list[Tensor]
    state: list[tuple[int, int]]


PACKED: MutableMapping[Tensor, Packed] = WeakTensorKeyDictionary()  # by weight


def packed(weight: Tensor, bias: Tensor | None) -> Packed:
    """The bfloat16 copies of a layer's parameters, made again when these have changed."""
    source = [parameter.detach() for parameter in (weight, bias) if parameter is not None]
    state = [(parameter.data_ptr(), parameter._version) for parameter in source]
    kept = PACKED.get(weight)
    if kept is None or kept.state != state:
        ordered = torch.ops.mkldnn._reorder_linear_weight(source[0].bfloat16(), 256)  # for about so many rows
        kept = PACKED[weight] = Packed(ordered, None if bias is None else source[1].bfloat16(), source, state)
    return kept


class Linear(nn.Linear):
    """`nn.Linear`, by oneDNN where that is faster: large products in float32, and inference under bfloat16 autocast.

    Autocast casts a weight again in every call. Here inference keeps the cast weight until the layer's weight changes,
    or the layer goes from training to evaluation or back.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., O)."""
        if torch.compiler.is_compiling() or not ONEDNN or x.device.type != "cpu" or self.weight.dtype != torch.float32:
            return super().forward(x)
        if not torch.is_autocast_enabled("cpu"):
            if x.dtype != torch.float32 or x.numel() * self.out_features < WORTHWHILE:
                return super().forward(x)
            return OneDNNLinear.apply(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])
        if torch.is_grad_enabled() or self.weight.is_inference() or torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return super().forward(x)  # an inference tensor has no version by which to see it change
        cast = packed(self.weight, self.bias)
        return onednn_linear(x.bfloat16(), cast.weight, cast.bias)

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:
            PACKED.pop(self.weight, None)
        return super().train(mode)
