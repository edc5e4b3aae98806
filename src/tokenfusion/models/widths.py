"""Any model of a known family at another width: all widths times a factor, rounded to what the family allows.

Depth, strides and expansion ratios stay, and so does the width of an attention head or of a group of channels.
"""

from collections.abc import Callable
from functools import singledispatch
from math import gcd
from typing import Any

from timm.models import regnet
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet, efficientnet_init_weights
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet as TimmResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenfusion.errors import InputError
from tokenfusion.models.cmt import CMT
from tokenfusion.models.crossvit import CrossViT
from tokenfusion.models.parents import ResNet
from tokenfusion.models.transformer import PlainTransformer

Build = Callable[..., nn.Module]


def scale(width: int, factor: float, step: int | None = None) -> int:
    """`width` times `factor`, a multiple of `step`; of 8 where `width` is one, or else of the power of 2 in it."""
    step = step or gcd(width, 8)
    return max(round(width * factor / step), 1) * step


def scale_heads(dim: int, heads: int, factor: float) -> tuple[int, int]:
    """Width and heads times `factor`, each head as nearly as wide as before as its number, a whole one, allows."""
    heads_then = scale(heads, factor, step=1)
    return scale(dim, factor, step=heads_then), heads_then


@singledispatch
def widen(model: nn.Module, factor: float, build: Build) -> nn.Module:  # noqa: ARG001
    """A model like another, but `factor` times as wide, from random weights.

    Args:
        model: the model at its own width, perhaps on the meta device; it is only looked at.
        factor: what widths are multiplied by, more than 0.
        build: makes that model anew, with further arguments of its class.

    Raises:
        InputError: a family whose widths are not known here.
    """
    families = sorted({family.__name__ for family in widen.registry if family is not object})
    raise InputError(
        f"how to widen a {type(model).__name__} is not known; widen one of the families {', '.join(families)}"
    )


@widen.register(PlainTransformer)
def _(model: Any, factor: float, build: Build) -> nn.Module:
    dim, heads = scale_heads(model.embed_dim, model.blocks[0].attn.heads, factor)
    return build(dim=dim, heads=heads)


@widen.register(VisionTransformer)
@widen.register(Beit)
def _(model: Any, factor: float, build: Build) -> nn.Module:
    dim, heads = scale_heads(model.embed_dim, model.blocks[0].attn.num_heads, factor)
    return build(embed_dim=dim, num_heads=heads)


@widen.register(CrossViT)
def _(model: Any, factor: float, build: Build) -> nn.Module:
    heads = model.stages[0].small[0].attn.heads, model.stages[0].large[0].attn.heads
    scaled = [scale_heads(dim, count, factor) for dim, count in zip(model.embed_dim, heads, strict=True)]
    return build(dims=tuple(dim for dim, _ in scaled), heads=tuple(count for _, count in scaled))


@widen.register(CMT)
def _(model: Any, factor: float, build: Build) -> nn.Module:
    # as the paper's own sizes: the heads and the width before the classifier stay
    heads = [stage.blocks[0].attn.heads for stage in model.stages]
    dims = tuple(scale(dim, factor, step=count) for dim, count in zip(model.dims, heads, strict=True))
    return build(dims=dims, stem_dim=scale(model.stem.conv1.out_channels, factor))


@widen.register(ResNet)
def _(model: Any, factor: float, build: Build) -> nn.Module:
    dims = tuple(scale(dim, factor) for dim in model.cnn.dims)
    return build(stem=scale(model.cnn.stem.conv.out_channels, factor), dims=dims)


@widen.register(TimmResNet)
def _(model: Any, factor: float, build: Build) -> nn.Module:
    expansion = model.layer1[0].expansion
    channels = tuple(scale(stage["num_chs"] // expansion, factor) for stage in model.feature_info[1:])
    if isinstance(model.conv1, nn.Conv2d):  # it has 64 channels, come what may
        return build(channels=channels)
    return build(channels=channels, stem_width=scale(model.conv1[3].out_channels, factor))


@widen.register(ConvNeXt)
def _(model: Any, factor: float, build: Build) -> nn.Module:
    return build(dims=tuple(scale(stage["num_chs"], factor) for stage in model.feature_info))


@widen.register(RegNet)
def _(model: Any, factor: float, build: Build) -> nn.Module:
    config = regnet.model_cfgs[model.default_cfg["architecture"]]
    first = scale(config.w0, factor)
    slope = config.wa * first / config.w0  # in step with the first width, so that stages keep their depths
    head = scale(config.num_features, factor) if config.num_features else 0
    return build(w0=first, wa=slope, stem_width=scale(config.stem_width, factor), num_features=head)


@widen.register(EfficientNet)
@widen.register(MobileNetV3)
def _(model: Any, factor: float, build: Build) -> nn.Module:  # noqa: ARG001
    # Their functions fix the width multiplier (arXiv 1704.04861, section 3.2), so that every layer is widened in place.
    wide: Any = build()
    for name, layer in wide.named_modules():
        if isinstance(layer, nn.Conv2d):
            widen_conv(layer, factor, images=name == "conv_stem")
        elif isinstance(layer, nn.BatchNorm2d):
            widen_norm(layer, factor)
        elif name == "classifier" and isinstance(layer, nn.Linear):
            layer.in_features = scale(layer.in_features, factor)
            layer.weight = nn.Parameter(layer.weight.new_empty(layer.out_features, layer.in_features))
        elif next(layer.parameters(recurse=False), None) is not None:
            raise InputError(f"how to widen a {type(layer).__name__} is not known; widen a model without ({name})")
    for point in wide.feature_info:
        point["num_chs"] = scale(point["num_chs"], factor)
    wide.num_features, wide.head_hidden_size = (scale(n, factor) for n in (wide.num_features, wide.head_hidden_size))
    efficientnet_init_weights(wide)
    return wide


def widen_conv(conv: nn.Conv2d, factor: float, *, images: bool) -> None:
    """Widen a convolution in place, groups as wide as before; one that reads images goes on reading as many channels.

    Its weights are left empty.
    """
    group_width = conv.in_channels // conv.groups
    conv.out_channels = scale(conv.out_channels, factor)
    if not images:
        conv.in_channels = scale(conv.in_channels, factor)
    if conv.groups > 1:
        conv.groups = conv.in_channels // group_width
    shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    conv.weight = nn.Parameter(conv.weight.new_empty(shape))
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias.new_empty(conv.out_channels))


def widen_norm(norm: nn.BatchNorm2d, factor: float) -> None:
    """Widen a BatchNorm in place; it starts anew."""
    norm.num_features = scale(norm.num_features, factor)
    norm.weight, norm.bias = (nn.Parameter(norm.weight.new_empty(norm.num_features)) for _ in range(2))
    norm.running_mean, norm.running_var = (norm.weight.new_empty(norm.num_features) for _ in range(2))
    norm.reset_parameters()
