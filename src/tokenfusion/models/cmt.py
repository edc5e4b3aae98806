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
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tokenfusion.layers.attend import check_heads
from tokenfusion.layers.blocks import init_linear_and_norm, rising_rates
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import grid_of, map_to_tokens, tokens_to_map
from tokenfusion.models.base import PaperModel, check_output_format, choose, image_size, linear_head
from tokenfusion.models.cmt_blocks import ATTENTIONS, STEMS, CMTBlock, Parts, PatchEmbedding
from tokenfusion.models.official import OfficialNames, read_pretrained
from tokenfusion.models.registration import register_variants

HEADS = (1, 2, 4, 8)
POOLING = (8, 4, 2, 1)
REDUCTIONS = (4, 8, 16, 32)


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
        self.embed = PatchEmbedding(in_chans, dim)
        self.positions = choose(ATTENTIONS, parts.attention, "attention").positions(heads, grid, pooling)
        self.blocks = nn.ModuleList(CMTBlock(dim, heads, pooling, parts, path) for path in paths)

    def forward(self, features: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """A map (B, in_chans, H, W) to one half as fine, (B, C, h, w); `run` calls a block, perhaps checkpointed."""
        tokens, grid = self.embed(features)
        bias = self.positions(grid, grid_of(grid, self.pooling))
        for block in self.blocks:
            tokens = run(block, tokens, grid, bias)
        return tokens_to_map(tokens, grid)


class CMT(PaperModel):
    """Four stages of blocks that convolve and attend; the head is a 1×1 convolution, Swish, and the average.

    Args:
        img_size: height and width the position tables are learned on, in pixels; forward takes any other too.
        in_chans: channels of an image.
        num_classes: outputs; 0 for none.
        dims, depths: width and number of blocks of each stage.
        stem_dim: width of the stem.
        mlp_ratio: hidden width of the feed-forward parts, in units of the width.
        head_dim: width of the convolution before the classifier.
        stem: "conv" or "patch".
        local: "lpu" or "none".
        attention: "lightweight" or "plain".
        feed_forward: "inverted_residual" or "plain".
        drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, in blocks, of attention maps.
        drop_path_rate: rate of stochastic depth at the last block.

    Raises:
        InputError: heads that do not divide a width, an unknown choice, an impossible size.
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
        stem_dim: int = 32,
        mlp_ratio: float = 4.0,
        head_dim: int = 1280,
        stem: str = "conv",
        local: str = "lpu",
        attention: str = "lightweight",
        feed_forward: str = "inverted_residual",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.img_size = image_size(img_size)
        parts = Parts(local, attention, feed_forward, mlp_ratio, attn_drop_rate, proj_drop_rate)
        rates = iter(rising_rates(drop_path_rate, sum(depths)))
        grids = [grid_of(self.img_size, reduction) for reduction in REDUCTIONS]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = head_dim
        self.stem = choose(STEMS, stem, "stem")(in_chans, stem_dim)
        self.stages = nn.ModuleList(
            Stage(before, dim, heads, pooling, grid, parts, [next(rates) for _ in range(depth)])
            for before, dim, depth, heads, pooling, grid in zip(
                (stem_dim, *dims[:-1]), dims, depths, HEADS, POOLING, grids, strict=True
            )
        )
        self.head_conv: nn.Module = nn.Conv2d(dims[-1], head_dim, 1)
        self.head_norm: nn.Module = nn.BatchNorm2d(head_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(init_linear_and_norm)
        self.apply(init_conv)
        self.head = self.build_head(num_classes)
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, REDUCTIONS, strict=True))
        ]

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

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps after chosen stages, with timm's signature; there is no final norm, so that `norm` changes nothing.

        Returns:
            The features as maps (B, C, h, w), or tokens for `output_fmt="NLC"`; and before them, unless
            `intermediates_only`, what `forward_features` gives (after `stop_early`, the map of the last stage run).
        """
        del norm
        check_output_format(output_fmt)
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        features = self.stem(x.contiguous(memory_format=torch.channels_last))
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            features = stage(features, self.run)
            if i in take:
                intermediates.append(features if output_fmt == "NCHW" else map_to_tokens(features))
        if intermediates_only:
            return intermediates
        return features if stop_early and last + 1 < len(self.stages) else self.widen(features), intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen features do not need: later stages, the head.

        Returns:
            The chosen features' indices, none negative.
        """
        del prune_norm
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.head_conv, self.head_norm = nn.Identity(), nn.Identity()
            self.reset_classifier(0)
        return take

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone."""
        return {name for name, _ in self.named_parameters() if name.endswith("positions.table")}


def init_conv(module: nn.Module) -> None:
    """Convolutions: Kaiming's normal by fan-out, biases 0; for `Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


VARIANTS: dict[str, tuple[type[CMT], dict[str, Any]]] = {
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
CONFIG: dict[str, Any] = {"crop_pct": 0.9, "interpolation": "bicubic", "first_conv": "stem.conv1"}
register_variants(
    __name__,
    VARIANTS,
    configs=dict.fromkeys(VARIANTS, CONFIG),
    out_indices=(0, 1, 2, 3),
    read_pretrained=read_pretrained,
)
