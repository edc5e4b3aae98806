"""Faster ways to the same numbers for CMT's maps, whose pixels are the rows of a matrix where they lie so.

`benchmarks/official.py` keeps them. What norms fold into is computed at each call here, and once in `packed.py`.

Letters: B batch, C channels, O outputs, h w map, r t a norm's factor and shift.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.layers.fast import cast_to, infers, linear


def lies_by_pixel(features: Tensor) -> bool:
    """Whether a map (B, C, h, w) is on a CPU, channels-last: its pixels are the rows of a matrix."""
    on_cpu = features.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and features.is_contiguous(memory_format=torch.channels_last)


class PointwiseConv(nn.Conv2d):
    """A 1×1 convolution, as one product over all pixels where they lie so.

    Its backward pass is faster so in bfloat16, and in float32 PyTorch unfolds the input of a single image's.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) to (B, O, h, w)."""
        if not lies_by_pixel(features):
            return super().forward(features)
        pixels = features.permute(0, 2, 3, 1)
        return linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def folds(module: nn.Module, features: Tensor, *norms: nn.Module) -> bool:
    """Whether norms may become part of the convolutions around them.

    They may where a module in full precision infers from a map that lies by pixel, by running statistics of BatchNorm,
    and no hook watches what the module does on its way.
    """
    return (
        infers(module)
        and lies_by_pixel(features)
        and all(map(is_affine, norms))
        and all(parameter.dtype in (torch.float32, torch.float64) for parameter in module.parameters())
        and not any(part.training or part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    )


def is_affine(norm: nn.Module) -> bool:
    """Whether a norm in evaluation is a factor and a shift of each channel, both in full precision."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None or not norm.affine:
        return False
    return norm.weight.dtype in (torch.float32, torch.float64)


def factor_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """r and t (C,) of BatchNorm in evaluation, N(x) = r x + t."""
    ratio = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return ratio, norm.bias - ratio * norm.running_mean


class GELU(nn.GELU):
    """`nn.GELU`; of a map that lies by pixel as of its rows.

    oneDNN's is for what lies in one piece as its dimensions are named; in bfloat16 it is twice as fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same."""
        if not lies_by_pixel(x):
            return super().forward(x)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def gelu_in_place(features: Tensor) -> Tensor:
    """GELU of a map (B, C, h, w) that lies by pixel without fresh memory, which costs more than it does."""
    torch.ops.aten.gelu_(features.permute(0, 2, 3, 1))
    return features


def more_pixels(features: Tensor) -> bool:
    """Whether a map (B, C, h, w) has more pixels than channels: norming it is more work than folding weights."""
    return features.numel() >= features.shape[1] ** 2


def convolve_normed(norm: nn.Module, features: Tensor, conv: nn.Conv2d) -> Tensor:
    """DWConv(N(x)) + N(x) for a depthwise 3×3 convolution of w (C, 3, 3) and b, and x (B, C, h, w).

    With N(x) = r x + t and the identity as one more weight at w's centre, it is one convolution of r (w + δ), whose
    bias is t (1 + Σ w) + b; but at the map's edges the weights that lie outside have not met t.
    """
    if not more_pixels(features):
        normed = norm(features)
        return conv(normed).add_(normed)
    return convolve_folded(features, *fold_into_depthwise(norm, conv))


def fold_into_depthwise(norm: nn.Module, conv: nn.Conv2d) -> tuple[Tensor, Tensor, Tensor]:
    """r (w + δ) as (C, 1, 3, 3), t (1 + Σ w) + b (C,), and w t (C, 3, 3), which is too much at the edges."""
    (ratio, shift), weight, bias = factor_and_shift(norm), conv.weight.flatten(0, 1), conv.bias
    assert bias is not None
    taps = weight * ratio[:, None, None]
    taps[:, 1, 1] += ratio
    return taps[:, None], shift * (1 + weight.sum((1, 2))) + bias, weight * shift[:, None, None]


def convolve_folded(features: Tensor, taps: Tensor, bias: Tensor, outside: Tensor) -> Tensor:
    """`convolve_normed` by what `fold_into_depthwise` gives."""
    convolved = F.conv2d(features, taps, bias, padding=1, groups=len(taps))
    outside = outside.to(convolved.dtype)
    for edge, row in ((0, 0), (2, -1)):
        convolved[:, :, row] -= outside[:, edge].sum(1)[:, None]
        convolved[:, :, :, row] -= outside[:, :, edge].sum(1)[:, None]
        convolved[:, :, row, 0] += outside[:, edge, 0]  # in both sums
        convolved[:, :, row, -1] += outside[:, edge, 2]
    return convolved


def product_between_norms(before: nn.Module, features: Tensor, conv: nn.Conv2d, after: nn.Module) -> Tensor:
    """N'(W N(x) + b) for a 1×1 convolution, as one product: (r' W r) x + r' (W t + b) + t'."""
    if not more_pixels(features):
        return after(conv(before(features)))
    pixels = features.permute(0, 2, 3, 1)
    return linear(pixels, *fold_into_product(before, conv, after)).permute(0, 3, 1, 2)


def fold_into_product(before: nn.Module, conv: nn.Conv2d, after: nn.Module) -> tuple[Tensor, Tensor]:
    """r' W r as (O, C), and r' (W t + b) + t' (O,)."""
    (ratio, shift), (ratio_after, shift_after) = factor_and_shift(before), factor_and_shift(after)
    weight, bias = conv.weight.flatten(1), conv.bias
    assert bias is not None
    shifted = (weight * shift).sum(1)  # not a product, which autocast would round
    return (weight * ratio).mul_(ratio_after[:, None]), ratio_after * (shifted + bias) + shift_after


class PoolCells(torch.autograd.Function):
    """y_c,mn = Σ_ij w_c,ij x_c,km+i,kn+j + b_c: a depthwise k×k convolution of stride k, for x (B, C, k·m, k·n).

    No pixel is in two cells, hence the gradients are plain products, ∂x = w ∂y of the pixel's cell and ∂w = Σ x ∂y;
    for ∂x in bfloat16 oneDNN takes a kernel for groups of channels (brgconv_strided), which is far slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        side = weight.shape[2]
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), stride=side, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        side, wide = weight.shape[2], torch.promote_types(x.dtype, torch.float32)
        by_cell = gradient.permute(0, 2, 3, 1)[:, :, None, :, None]  # (B, m, 1, n, 1, C)
        x_gradient = weight_gradient = None
        if wants_x:
            taps = weight.to(x.dtype).permute(1, 2, 3, 0)[:, :, None]  # (1, k, 1, k, C)
            x_gradient = (by_cell * taps).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        if wants_weight:
            pixels = x.permute(0, 2, 3, 1).unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, m, k, n, k, C)
            summed = (pixels * by_cell).sum(3, dtype=wide).sum((0, 1))  # one sum over all three is slow
            weight_gradient = summed.permute(2, 0, 1)[:, None]
        return x_gradient, weight_gradient, gradient.sum((0, 2, 3), dtype=wide) if wants_bias else None


def pool_cells(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`PoolCells`, under autocast too."""
    return PoolCells.apply(x.to(cast_to(x) or x.dtype), weight, bias)
