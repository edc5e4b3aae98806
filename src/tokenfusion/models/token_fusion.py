"""Token Fusion: pixels of a CNN's feature map as tokens beside image patches, fused early, late or layer by layer.

Source: "Token Fusion", arXiv 2208.09183 (IEEE Access 2023). Only the abstract is at hand and no code was published, so
the widths and the fusion operators are this project's own.

Parts. CNN: `layers/conv.py`. Transformer: the pre-norm block of `layers/blocks.py`. `benchmarks/parts.py` times timm's
beside them: its `Block` takes longer at equal cost on the CPU that the micro models are for; a CNN of its `BasicBlock`
takes as long per multiply-add, and needs more of them for the same widths.
Positions: one learned table for both kinds of token, resized to each grid, so that a pixel and a patch at the same
place know it. The head reads CLS.

Letters: B batch, N tokens, C channels, h w grid; P patch tokens, M pixel tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.layers.attend import SelfAttention, check_heads
from tokenfusion.layers.blocks import Block, PaddedConv, layer_norm, rising_rates
from tokenfusion.layers.conv import ConvTrunk
from tokenfusion.layers.intermediates import FeaturePoint
from tokenfusion.layers.positions import PositionTable
from tokenfusion.layers.tokens import (
    AttentionLayout,
    PixelTokens,
    TokenGroup,
    TokenLayout,
    grid_of,
    map_to_tokens,
    size_of,
    tokens_to_map,
)
from tokenfusion.models.base import PaperModel, at_least, image_size
from tokenfusion.models.registration import register_variants

CLS = TokenGroup("cls")


class TokenFusion(PaperModel):
    """What the three strategies share: a CNN, patch tokens with CLS, transformer blocks, and a head on CLS.

    Args:
        img_size: height and width that the position table is made for; any other size may be given to `forward`.
        in_chans: channels of the images.
        num_classes: outputs of the head; 0 for none.
        dim, heads, depth, mlp_ratio: width, heads, blocks and MLP expansion of the transformer.
        patch_size: side of a patch in pixels.
        stem, conv_strides, conv_dims, conv_depths: the CNN, as in `ConvTrunk`.
        drop_rate: dropout before the head.
        drop_path_rate: largest rate of stochastic depth; it grows linearly with depth.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        depth: int,
        mlp_ratio: float,
        patch_size: int,
        stem: int,
        conv_strides: Sequence[int],
        conv_dims: Sequence[int],
        conv_depths: Sequence[int],
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, depth=depth, patch_size=patch_size, in_chans=in_chans, stem=stem)
        at_least(1, conv_strides=conv_strides, conv_dims=conv_dims)
        check_heads(dim, heads)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.img_size = image_size(img_size)
        self.patch_size = patch_size

        self.cnn = ConvTrunk(in_chans, stem, conv_strides, conv_dims, conv_depths)
        self.patches = PaddedConv(in_chans, dim, patch_size, patch_size)
        self.positions = PositionTable(dim, grid_of(self.img_size, patch_size), prefix_tokens=0)
        self.cls_token = nn.Parameter(trunc_normal_(torch.zeros(1, 1, dim), std=0.02))
        self.blocks = nn.Sequential(
            *[
                Block(dim, SelfAttention(dim, heads), mlp_ratio, path=path)
                for path in rising_rates(drop_path_rate, depth)
            ]
        )
        self.norm = layer_norm(dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self.build_head(num_classes)

    def embed_patches(self, images: Tensor) -> Tensor:
        """[CLS; patch tokens] (B, 1 + P, C) of images (B, in_chans, H, W)."""
        patches = map_to_tokens(self.patches(images)) + self.positions(grid_of(size_of(images), self.patch_size))
        return torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches], dim=1)

    def feature_points(self) -> list[FeaturePoint]:
        """Where intermediate features are taken: after each stage of the CNN, then after each block (patch tokens)."""
        stages = zip(self.cnn.dims, self.cnn.reductions, strict=True)
        return [
            *[FeaturePoint(f"cnn.stages.{i}", channels, reduction) for i, (channels, reduction) in enumerate(stages)],
            *[FeaturePoint(f"blocks.{i}", self.embed_dim, self.patch_size, 1, "norm") for i in range(len(self.blocks))],
        ]

    def drop_layers_after(self, points: Sequence[FeaturePoint]) -> None:
        """Keep all of them: each side's layers feed the other's, or are told apart by their number."""

    def build_head(self, num_classes: int) -> nn.Module:
        at_least(0, num_classes=num_classes)
        return nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("cls_token", "table", "source", "gate"))}

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to normalised tokens (B, N, C), CLS first, laid out as `token_layout` says."""
        raise NotImplementedError

    def token_layout(self, img_size: tuple[int, int] | None = None) -> TokenLayout:
        """What each token of `forward_features` is, for images of `img_size` (H, W) or the model's own size."""
        return CLS, TokenGroup("patch", grid_of(img_size or self.img_size, self.patch_size))

    def attention_layouts(self, img_size: tuple[int, int] | None = None) -> dict[str, AttentionLayout]:
        layout = AttentionLayout.among(self.token_layout(img_size))
        return {f"blocks.{i}.attn": layout for i in range(len(self.blocks))}

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) to logits (B, num_classes), or to the head's input (B, C)."""
        cls = self.head_drop(tokens[:, 0])
        return cls if pre_logits else self.head(cls)


class PixelSource(nn.Module):
    """The last map of a CNN as tokens beside patch tokens: projected, placed, and marked by a source embedding."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.pixels = PixelTokens(channels, dim)
        self.source = nn.Parameter(trunc_normal_(torch.zeros(1, 1, dim), std=0.02))

    def forward(self, feature_map: Tensor, positions: Tensor) -> Tensor:
        """Map (B, channels, h, w) and positions (1, h·w, C) to tokens (B, M, C)."""
        return self.pixels(feature_map) + positions + self.source


class JointFusion(TokenFusion):
    """[CLS; patch tokens; pixel tokens] meet by self-attention; early and late differ in where."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.pixel_source = PixelSource(self.cnn.dims[-1], self.embed_dim)

    def embed_pixels(self, images: Tensor) -> Tensor:
        """Pixel tokens (B, M, C) of the CNN's last map."""
        feature_map = self.cnn.stem(images)
        for stage in self.cnn.stages:
            feature_map = self.run(stage, feature_map)
        return self.pixel_source(feature_map, self.positions(size_of(feature_map)))

    def token_layout(self, img_size: tuple[int, int] | None = None) -> TokenLayout:
        size = img_size or self.img_size
        return *super().token_layout(size), TokenGroup("pixel", grid_of(size, self.cnn.reductions[-1]))


class EarlyFusion(JointFusion):
    """The tokens are joined at the entrance; one encoder carries them together."""

    def forward_features(self, images: Tensor) -> Tensor:
        tokens = torch.cat([self.embed_patches(images), self.embed_pixels(images)], dim=1)
        for block in self.blocks:
            tokens = self.run(block, tokens)
        return self.norm(tokens)


class LateFusion(JointFusion):
    """Each side runs to its end; then the last `fusion_depth` blocks carry the tokens of both."""

    def __init__(self, *, fusion_depth: int, **config: Any) -> None:
        super().__init__(**config)
        at_least(1, fusion_depth=fusion_depth)
        if fusion_depth > (depth := len(self.blocks)):
            raise InputError(f"fusion_depth={fusion_depth} is more than all depth={depth} blocks; try {depth}")
        self.fusion_depth = fusion_depth

    def forward_features(self, images: Tensor) -> Tensor:
        tokens, pixels = self.embed_patches(images), self.embed_pixels(images)
        for block in self.blocks[: -self.fusion_depth]:
            tokens = self.run(block, tokens)
        tokens = torch.cat([tokens, pixels], dim=1)
        for block in self.blocks[-self.fusion_depth :]:
            tokens = self.run(block, tokens)
        return self.norm(tokens)

    def attention_layouts(self, img_size: tuple[int, int] | None = None) -> dict[str, AttentionLayout]:
        patches_only = AttentionLayout.among(TokenFusion.token_layout(self, img_size))
        alone = len(self.blocks) - self.fusion_depth
        layouts = super().attention_layouts(img_size)
        return {name: patches_only if i < alone else layout for i, (name, layout) in enumerate(layouts.items())}


class PixelsToPatches(nn.Module):
    """Add to every patch token the pixels of a feature map that lie in its place, through a gate."""

    def __init__(self, channels: int, dim: int, gate: float) -> None:
        super().__init__()
        self.pixels = PixelTokens(channels, dim)
        self.gate = nn.Parameter(torch.full((dim,), gate))

    def forward(self, feature_map: Tensor, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map (B, channels, h, w) and [CLS; patch tokens] (B, 1 + P, C) on `grid` to new tokens (B, 1 + P, C)."""
        cls, patches = tokens[:, :1], tokens[:, 1:]
        update = self.pixels(F.adaptive_avg_pool2d(feature_map, grid))
        return torch.cat([cls, patches + self.gate.to(update.dtype) * update], dim=1)


class PatchesToPixels(nn.Module):
    """Add to every pixel of a feature map the patch token that covers it, through a gate."""

    def __init__(self, dim: int, channels: int, gate: float) -> None:
        super().__init__()
        self.norm = layer_norm(dim)
        self.proj = nn.Linear(dim, channels)
        self.gate = nn.Parameter(torch.full((channels, 1, 1), gate))

    def forward(self, tokens: Tensor, feature_map: Tensor, grid: tuple[int, int]) -> Tensor:
        """[CLS; patch tokens] (B, 1 + P, C) on `grid` and map (B, channels, h, w) to a new map (B, channels, h, w)."""
        update = tokens_to_map(self.proj(self.norm(tokens[:, 1:])), grid)
        return feature_map + self.gate.to(update.dtype) * F.adaptive_avg_pool2d(update, size_of(feature_map))


class LayerwiseFusion(TokenFusion):
    """The two exchange tokens after every stage of the CNN; the transformer's blocks are spread over as many groups.

    Args:
        gate: start of the gates that every exchange ends in. 0 leaves each side as it was alone, for parents that are
            trained; the presets start from random weights and open the gates.
    """

    def __init__(self, *, gate: float = 0.0, **config: Any) -> None:
        super().__init__(**config)
        stages, depth = len(self.cnn.dims), len(self.blocks)
        if depth % stages:
            raise InputError(
                f"depth={depth} does not spread over {stages} CNN stages; try {max(depth // stages, 1) * stages}"
            )
        self.group_depth = depth // stages
        self.to_patches = nn.ModuleList(PixelsToPatches(channels, self.embed_dim, gate) for channels in self.cnn.dims)
        # after the last stage nobody reads the map any more
        self.to_pixels = nn.ModuleList(
            PatchesToPixels(self.embed_dim, channels, gate) for channels in self.cnn.dims[:-1]
        )

    def forward_features(self, images: Tensor) -> Tensor:
        grid = grid_of(size_of(images), self.patch_size)
        feature_map, tokens = self.cnn.stem(images), self.embed_patches(images)
        for i, stage in enumerate(self.cnn.stages):
            feature_map = self.run(stage, feature_map)
            tokens = self.to_patches[i](feature_map, tokens, grid)
            for block in self.blocks[i * self.group_depth : (i + 1) * self.group_depth]:
                tokens = self.run(block, tokens)
            if i < len(self.to_pixels):
                feature_map = self.to_pixels[i](tokens, feature_map, grid)
        return self.norm(tokens)


SIZES: dict[str, dict[str, Any]] = {
    "micro": {"img_size": 32, "num_classes": 10, "patch_size": 8, "dim": 64, "heads": 2, "mlp_ratio": 2.0}
    | {"stem": 16, "conv_strides": (1, 2, 2, 2), "conv_dims": (48, 96, 112), "conv_depths": (1, 1, 1)},
    "tiny": {"img_size": 224, "patch_size": 16, "dim": 192, "heads": 3, "mlp_ratio": 4.0}
    | {"stem": 32, "conv_strides": (2, 2, 2, 2), "conv_dims": (48, 112, 256), "conv_depths": (1, 1, 1)},
    "small": {"img_size": 224, "patch_size": 16, "dim": 384, "heads": 6, "mlp_ratio": 4.0}
    | {"stem": 32, "conv_strides": (2, 2, 2, 2), "conv_dims": (64, 192, 384), "conv_depths": (1, 1, 1)},
    "base": {"img_size": 224, "patch_size": 16, "dim": 768, "heads": 12, "mlp_ratio": 4.0}
    | {"stem": 64, "conv_strides": (2, 2, 2, 2), "conv_dims": (128, 256, 512), "conv_depths": (2, 2, 2)},
}
# What spends the budget (docs/design.md): MACs of micro at 32×32, of the others at 224×224.
DEPTHS: dict[type[TokenFusion], dict[str, dict[str, Any]]] = {
    EarlyFusion: {
        "micro": {"depth": 2},
        "tiny": {"depth": 3},
        "small": {"depth": 4},
        "base": {"depth": 4},
    },
    LateFusion: {
        "micro": {"depth": 3, "fusion_depth": 1},
        "tiny": {"depth": 5, "fusion_depth": 1},
        "small": {"depth": 7, "fusion_depth": 2},
        "base": {"depth": 6, "fusion_depth": 2},
    },
    LayerwiseFusion: {  # from random weights there is nothing to protect: the gates start open
        "micro": {"depth": 3, "gate": 1.0},
        "tiny": {"depth": 6, "gate": 1.0},
        "small": {"depth": 9, "gate": 1.0},
        "base": {"conv_depths": (2, 3, 2), "depth": 6, "gate": 1.0},
    },
}
STRATEGIES: dict[str, type[TokenFusion]] = {"late": LateFusion, "early": EarlyFusion, "layerwise": LayerwiseFusion}
VARIANTS = {
    f"tokenfusion_{strategy}_{size}": (model_cls, config | DEPTHS[model_cls][size])
    for strategy, model_cls in STRATEGIES.items()
    for size, config in SIZES.items()
}
register_variants(__name__, VARIANTS)
