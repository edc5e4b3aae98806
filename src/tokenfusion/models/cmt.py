"""CMT (Guo et al., arXiv 2107.06263): a transformer in four stages with convolutions in every block.

Source: the paper and the facts of its public code (ggjy/CMT.pytorch, MIT by its README); written anew. Deviations: any
image size (maps padded with zeros to whole cells, position tables interpolated), any number of channels, no dropout
before the head unless asked for (the official code has 0.1, and 0.3 for `cmt_b`), no weight decay of position tables.

Letters: B batch, N tokens, C channels, H heads, h w grid.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.layers.attend import check_heads
from tokenfusion.layers.blocks import init_linear_and_norm, rising_rates
from tokenfusion.layers.fast_maps import PointwiseConv
from tokenfusion.layers.intermediates import FeaturePoint
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, TokenLayout, grid_of, tokens_to_map
from tokenfusion.models.base import PaperModel, at_least, choose, image_size, linear_head
from tokenfusion.models.cmt_blocks import ATTENTIONS, NORMS, POSITIONS, STEMS, CMTBlock, Parts, PatchEmbedding
from tokenfusion.models.official import OfficialNames, read_pretrained
from tokenfusion.models.registration import register_variants


class Stage(nn.Module):
    """Patch embedding, then blocks that share one table of relative positions.

    Args:
        in_chans: channels of the map that enters.
        dim, heads, pooling: as in `LightweightAttention`.
        grid: rows and columns the positions are learned on.
        parts: what a block is made of.
        paths: stochastic depth's rate of each block.
    """

    def __init__(
        self, in_chans: int, dim: int, heads: int, pooling: int, grid: Grid, parts: Parts, paths: Sequence[float]
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.pooling = pooling
        self.attention = choose(ATTENTIONS, parts.attention, "attention")
        self.embed = PatchEmbedding(in_chans, dim)
        self.positions = choose(POSITIONS, parts.positions, "positions")(self.attention, heads, grid, pooling)
        self.blocks = nn.ModuleList(CMTBlock(dim, heads, pooling, parts, path) for path in paths)

    def forward(self, features: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """A map (B, in_chans, H, W) to one half as fine, (B, C, h, w); `run` calls a block, perhaps checkpointed."""
        tokens, grid = self.embed(features)
        bias = self.positions(grid, grid_of(grid, self.pooling))
        for block in self.blocks:
            tokens = run(block, tokens, grid, bias)
        return tokens_to_map(tokens, grid)

    def attention_layouts(self, grid: Grid) -> dict[str, AttentionLayout]:
        """What each attention's queries and keys are, by name, for tokens on a grid."""
        return {f"blocks.{i}.attn": self.attention.layout(grid, self.pooling) for i in range(len(self.blocks))}


class CMT(PaperModel):
    """Stages of blocks that convolve and attend; the head is a 1×1 convolution, Swish, and the average.

    Args:
        img_size: height and width the position tables are learned on, in pixels; forward takes any other too.
        in_chans: channels of an image.
        num_classes: outputs; 0 for none.
        dims, depths, heads, pooling: width, number of blocks, attention heads and pooling of keys of each stage.
        stem_dim, stem_stride: width and stride of the stem.
        mlp_ratio: hidden width of the feed-forward parts, in units of the width.
        head_dim: width of the convolution before the classifier.
        stem: "conv" or "patch".
        local: "lpu" or "none".
        attention: "lightweight", or "plain": neither pooled nor with positions.
        positions: "relative" or "none", of lightweight attention.
        feed_forward: "inverted_residual" or "plain".
        norm: "mixed" as published, LayerNorm of tokens and BatchNorm behind convolutions; "batch_norm" or "layer_norm"
            everywhere.
        drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, in blocks, of attention maps.
        drop_path_rate: rate of stochastic depth at the last block.

    Raises:
        InputError: heads that do not divide a width, an unknown choice, an impossible size or number, unlike
            numbers of stages.
    """

    official_names = OfficialNames(
        rules=(
            (r"^stem\.(conv|norm)(\d)", r"stem_\1\2"),
            *((rf"^stages\.{i}\.", f"stage_{letter}.") for i, letter in enumerate("abcd")),
            (r"^stage_([a-d])\.embed\.", r"patch_embed_\1."),
            (r"^stage_([a-d])\.positions\.table$", r"relative_pos_\1"),
            (r"^stage_([a-d])\.blocks\.", r"blocks_\1."),
            (r"\.local\.conv\.", ".proj."),
            (r"\.attn\.pool\.", ".attn.sr."),
            (r"\.ffn\.expand\.", ".mlp.conv1."),
            (r"\.ffn\.conv\.", ".mlp.proj."),
            (r"\.ffn\.norm\.1\.", ".mlp.proj_bn."),
            (r"\.ffn\.project\.", ".mlp.conv2."),
            (r"^head_conv\.", "_fc."),
            (r"^head_norm\.", "_bn."),
        ),
        signature=r"^relative_pos_a$",
    )

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 3, 16, 3),
        heads: Sequence[int] = (1, 2, 4, 8),
        pooling: Sequence[int] = (8, 4, 2, 1),
        stem_dim: int = 32,
        stem_stride: int = 2,
        mlp_ratio: float = 4.0,
        head_dim: int = 1280,
        stem: str = "conv",
        local: str = "lpu",
        attention: str = "lightweight",
        positions: str = "relative",
        feed_forward: str = "inverted_residual",
        norm: str = "mixed",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(heads) == len(pooling):
            given = f"dims={dims}, depths={depths}, heads={heads}, pooling={pooling}"
            raise InputError(f"{given} are not of as many stages; give each a value per stage")
        at_least(1, dims=dims, depths=depths, pooling=pooling, in_chans=in_chans)
        at_least(1, stem_dim=stem_dim, stem_stride=stem_stride, head_dim=head_dim)
        self.img_size = image_size(img_size)
        parts = Parts(local, attention, positions, feed_forward, mlp_ratio, attn_drop_rate, proj_drop_rate)
        rates = iter(rising_rates(drop_path_rate, sum(depths)))
        self.dims = tuple(dims)
        self.reductions = tuple(stem_stride * 2**i for i in range(1, len(dims) + 1))
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = head_dim
        self.stem = choose(STEMS, stem, "stem")(in_chans, stem_dim, stem_stride)
        grids = [grid_of(self.img_size, reduction) for reduction in self.reductions]
        self.stages = nn.ModuleList(
            Stage(before, dim, count, cell, grid, parts, [next(rates) for _ in range(depth)])
            for before, dim, count, cell, grid, depth in zip(
                (stem_dim, *dims[:-1]), dims, heads, pooling, grids, depths, strict=True
            )
        )
        self.head_conv: nn.Module = PointwiseConv(dims[-1], head_dim)
        self.head_norm: nn.Module = nn.BatchNorm2d(head_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(init_linear_and_norm)
        self.apply(init_conv)
        choose(NORMS, norm, "norm")(self)
        self.head = self.build_head(num_classes)

    def build_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.head_hidden_size, num_classes)

    def widen(self, features: Tensor) -> Tensor:
        """The last stage's map to the map that is averaged: 1×1 convolution, BatchNorm, Swish."""
        return F.silu(self.head_norm(self.head_conv(features)))

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the map (B, head_dim, h, w) that the head averages."""
        features = self.stem(images.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            features = stage(features, self.run)
        return self.widen(features)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The map (B, head_dim, h, w) to logits (B, num_classes), or to its average (B, head_dim)."""
        pooled = self.head_drop(features.mean(dim=(2, 3)))
        return pooled if pre_logits else self.head(pooled)

    def feature_points(self) -> list[FeaturePoint]:
        """The map after each stage."""
        shapes = zip(self.dims, self.reductions, strict=True)
        return [FeaturePoint(f"stages.{i}", dim, reduction) for i, (dim, reduction) in enumerate(shapes)]

    def token_layout(self, img_size: Grid | None = None) -> TokenLayout:
        """What each pixel of `forward_features`' map is."""
        return (TokenGroup("patch", grid_of(img_size or self.img_size, self.reductions[-1])),)

    def attention_layouts(self, img_size: Grid | None = None) -> dict[str, AttentionLayout]:
        layouts: dict[str, AttentionLayout] = {}
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            inside = stage.attention_layouts(grid_of(img_size or self.img_size, self.reductions[i]))
            layouts |= {f"stages.{i}.{name}": layout for name, layout in inside.items()}
        return layouts

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.head_conv, self.head_norm = nn.Identity(), nn.Identity()
        return take

    def layers(self) -> list[str]:
        rows = [r"stem\."]
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            blocks = ["embed|positions|blocks.0", *(f"blocks.{j}" for j in range(1, len(stage.blocks)))]
            rows += [rf"stages\.{i}\.({block})\." for block in blocks]
        return rows

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("positions.table")}


def init_conv(module: nn.Module) -> None:
    """Convolutions: Kaiming's normal by fan-out, biases 0; for `Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


OFFICIAL: dict[str, tuple[type[CMT], dict[str, Any]]] = {
    "cmt_ti": (
        CMT,
        {"img_size": 160, "dims": (46, 92, 184, 368), "depths": (2, 2, 10, 2), "stem_dim": 16, "mlp_ratio": 3.6},
    ),
    "cmt_xs": (
        CMT,
        {"img_size": 192, "dims": (52, 104, 208, 416), "depths": (3, 3, 12, 3), "stem_dim": 16, "mlp_ratio": 3.77},
    ),
    "cmt_s": (CMT, {"img_size": 224, "dims": (64, 128, 256, 512), "depths": (3, 3, 16, 3), "stem_dim": 32}),
    "cmt_b": (CMT, {"img_size": 256, "dims": (76, 152, 304, 608), "depths": (4, 4, 20, 4), "stem_dim": 38}),
}
SMALL_IMAGES: dict[str, Any] = {"img_size": 32, "num_classes": 10, "stem_stride": 1}  # three stages end at 4×4
MICRO: dict[str, tuple[type[CMT], dict[str, Any]]] = {
    "cmt_micro": (
        CMT,
        SMALL_IMAGES
        | {"dims": (32, 64, 128), "depths": (2, 2, 5), "heads": (1, 2, 4), "pooling": (4, 2, 1)}
        | {"stem_dim": 16, "head_dim": 256},
    ),
}
VARIANTS = OFFICIAL | MICRO
CONFIG: dict[str, Any] = {"first_conv": "stem.conv1", "pool_size": (4, 4)}
OFFICIAL_CONFIG: dict[str, Any] = {"crop_pct": 0.9, "interpolation": "bicubic"}
register_variants(
    __name__,
    OFFICIAL,
    configs={
        name: CONFIG | OFFICIAL_CONFIG | {"pool_size": (arguments["img_size"] // 32,) * 2}
        for name, (_, arguments) in OFFICIAL.items()
    },
    out_indices=(0, 1, 2, 3),
    read_pretrained=read_pretrained,
)
register_variants(
    __name__, MICRO, configs=dict.fromkeys(MICRO, CONFIG), out_indices=(0, 1, 2), read_pretrained=read_pretrained
)
