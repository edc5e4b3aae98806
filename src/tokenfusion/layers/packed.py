"""A model that only infers on a CPU: what its weights are cast, folded and laid out to is kept from call to call.

Its numbers are those of the model as it is, to the bit; `benchmarks/official.py` has what is gained. Nothing tells for
certain that a weight has changed, hence this is a copy that one asks for, and `fast.py` keeps nothing.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenfusion.layers.blocks import DepthwisePool, PaddedConv
from tokenfusion.layers.fast import ONEDNN, Linear, cast_to, linear
from tokenfusion.layers.fast_maps import PointwiseConv, lies_by_pixel


def pack(model: nn.Module, kind: torch.dtype) -> nn.Module:
    """A copy of a model for inference on a CPU in float32, or in bfloat16 by autocast.

    It shares the model's tensors, and does not see what becomes of them. The model itself where nothing can be gained.
    """
    if kind == torch.bfloat16 and not ONEDNN:
        return model
    return pack_parts(model, kind)


def pack_parts(module: nn.Module, kind: torch.dtype) -> nn.Module:
    """A copy of a module, that shares its tensors, with its parts packed: their own way, or by WAYS."""
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    replace_parts(twin, kind)
    return twin


def replace_parts(module: nn.Module, kind: torch.dtype) -> None:
    """Put what is packed in the place of a module's parts, and of theirs."""
    part: Any
    for name, part in module.named_children():
        if hasattr(part, "packed"):
            setattr(module, name, part.packed(kind))
        elif kind == torch.bfloat16 and type(part) in WAYS:
            setattr(module, name, WAYS[type(part)](part))
        else:
            replace_parts(part, kind)


class PackedProduct(nn.Module):
    """x wᵀ + b for w (O, K) and b (O,) or None that do not change."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: torch.dtype) -> None:
        super().__init__()
        self.kind = kind
        self.weight = weight.detach().to(kind)
        self.bias = None if bias is None else bias.detach().to(kind)
        if kind == torch.bfloat16:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., O)."""
        if self.kind != torch.bfloat16:
            return linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x.to(self.kind), self.weight, self.bias, "none", [], "")


class PackedLinear(nn.Linear):
    """A linear layer, packed; where no autocast is, as it was."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.product = PackedProduct(layer.weight, layer.bias, torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., O)."""
        return self.product(x) if cast_to(x) == torch.bfloat16 else linear(x, self.weight, self.bias)


class PackedPointwise(nn.Module):
    """A 1×1 convolution, packed."""

    def __init__(self, conv: PointwiseConv) -> None:
        super().__init__()
        self.conv = conv
        self.product = PackedProduct(conv.weight.flatten(1), conv.bias, torch.bfloat16)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) to (B, O, h, w)."""
        if not lies_by_pixel(features) or cast_to(features) != torch.bfloat16:
            return self.conv(features)
        return self.product(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def cast_conv(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution with its weights in bfloat16, as autocast would cast them at each call."""
    twin = copy.copy(conv)
    twin._parameters = {  # others than the convolution's own, which stays as it is
        name: None if one is None else nn.Parameter(one.detach().bfloat16(), requires_grad=False)
        for name, one in conv._parameters.items()
    }
    return twin


WAYS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: PackedLinear,
    Linear: PackedLinear,
    PointwiseConv: PackedPointwise,
    nn.Conv2d: cast_conv,
    PaddedConv: cast_conv,
    DepthwisePool: cast_conv,
}
"""What packs a kind of layer in bfloat16, exactly that kind: its heirs may use their weights in other ways."""
