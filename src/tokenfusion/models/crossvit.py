"""CrossViT (Chen et al., arXiv 2103.14899): two branches of small and large patches that exchange their CLS tokens.

Source: the paper and the facts of its public code (IBM/CrossViT, Apache-2.0); written anew. Deviations: an image of
another size than the trained one is not resized to it; each branch sees it at its own scale, resized to whole patches,
and the position tables are interpolated. Any number of channels.

Letters: B batch, N tokens, C channels, H heads, D head width, h w grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.layers.attend import SelfAttention, check_heads
from tokenfusion.layers.blocks import Block, TokenEmbedding, init_linear_and_norm, layer_norm, rising_rates
from tokenfusion.layers.intermediates import FeaturePoint
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, TokenLayout
from tokenfusion.models.backbones import TokenBackbone
from tokenfusion.models.base import at_least, choose, image_size, linear_head
from tokenfusion.models.crossvit_fusion import FUSIONS, Branch, BranchGrids, Fusion, Pair, Rates
from tokenfusion.models.crossvit_patches import STEMS, ImageScale
from tokenfusion.models.official import OfficialNames, read_pretrained
from tokenfusion.models.registration import register_variants

STAGES = 3
"""Multi-scale encoders, the paper's K, unless told otherwise."""


class Stage(nn.Module):
    """A multi-scale encoder: blocks in each branch, then fusion (figure 2).

    Args:
        small, large: the branches.
        depths: blocks in the small and the large branch.
        fusion: class of the fusion.
        fusion_depth: cross-attentions in it, one after another.
        rates: dropout rates.
        paths: stochastic depth's rate of each block; the fusion's is the last.
    """

    def __init__(
        self,
        small: Branch,
        large: Branch,
        depths: tuple[int, int],
        fusion: type[Fusion],
        fusion_depth: int,
        rates: Rates,
        paths: Sequence[float],
    ) -> None:
        super().__init__()

        def blocks(branch: Branch, depth: int) -> nn.Sequential:
            dim, heads, mlp_ratio = branch
            return nn.Sequential(
                *(
                    Block(dim, SelfAttention(dim, heads, *rates), mlp_ratio, rates.proj_drop, path)
                    for path in paths[:depth]
                )
            )

        self.small, self.large = blocks(small, depths[0]), blocks(large, depths[1])
        self.fusion = fusion(small, large, rates, paths[-1], fusion_depth)

    def forward(self, small: Tensor, large: Tensor, grids: BranchGrids) -> Pair:
        """Tokens (B, 1 + N, C) of either branch to the same."""
        return self.fusion(self.small(small), self.large(large), grids)

    def attention_layouts(self, small: TokenLayout, large: TokenLayout) -> dict[str, AttentionLayout]:
        """What each attention's queries and keys are, by name, of branches so laid out."""
        layouts = {f"small.{i}.attn": AttentionLayout.among(small) for i in range(len(self.small))}
        layouts |= {f"large.{i}.attn": AttentionLayout.among(large) for i in range(len(self.large))}
        return layouts | {f"fusion.{name}": one for name, one in self.fusion.attention_layouts(small, large).items()}


class TwoHeads(nn.Module):
    """The mean of two linear classifiers' logits, one on each branch's CLS token."""

    def __init__(self, dims: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        self.dims = dims
        self.small, self.large = linear_head(dims[0], num_classes), linear_head(dims[1], num_classes)

    def forward(self, cls: Tensor) -> Tensor:
        """Both branches' CLS tokens in a row (B, C + C') to logits (B, num_classes)."""
        small, large = torch.split(cls, list(self.dims), dim=1)
        return (self.small(small) + self.large(large)) / 2


@dataclass
class SmallBranch:
    """What stages need besides the large branch's tokens: the small one's, which each stage replaces; both grids."""

    tokens: Tensor
    grids: BranchGrids


class CrossViT(TokenBackbone):
    """Two transformers over patches of two sizes, fused after each stage; the head is the mean of both.

    Args:
        img_size: height and width that the small branch's position table is learned on, in pixels; forward takes any
            other too.
        patch_sizes: side in pixels of the small and the large branch's patches.
        large_scale: what of the image's size the large branch sees, as (numerator, denominator).
        in_chans: channels of an image.
        num_classes: outputs; 0 for none.
        dims: widths of the small and the large branch.
        heads: attention heads of either.
        depths: blocks of either in each stage.
        encoders: number of stages, multi-scale encoders in the paper's words.
        mlp_ratio: hidden width of the MLPs, in units of the width.
        stem: how patches become tokens: "linear", or "conv" for the dagger.
        fusion: "cross_attention", "all_attention", "cls_sum", "pairwise", or "none": the branches run apart.
        fusion_depth: cross-attentions of either way in each stage; 1 for every other fusion.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, after the positions, after
            linear maps, of attention maps.
        drop_path_rate: rate of stochastic depth at the last block.

    Raises:
        InputError: heads that do not divide the width, an unknown choice, an impossible size or number.
    """

    official_names = OfficialNames(
        rules=(
            (r"^embed_(small|large)\.cls_token$", r"cls_token.\1"),
            (r"^embed_(small|large)\.positions\.table$", r"pos_embed.\1"),
            (r"^embed_(small|large)\.patches\.", r"patch_embed.\1.proj."),
            (r"^stages\.(\d)\.(small|large)\.", r"blocks.\1.blocks.\2."),
            (r"^stages\.(\d)\.fusion\.(small|large)\.project\.", r"blocks.\1.projs.\2."),
            (r"^stages\.(\d)\.fusion\.(small|large)\.project_back\.", r"blocks.\1.revert_projs.\2."),
            (r"^stages\.(\d)\.fusion\.(small|large)\.norm\.", r"blocks.\1.fusion.\2.norm1."),
            (r"^stages\.(\d)\.fusion\.(small|large)\.attn\.([qkv])\.", r"blocks.\1.fusion.\2.attn.w\3."),
            (r"^stages\.(\d)\.fusion\.", r"blocks.\1.fusion."),
            (r"^norm_(small|large)\.", r"norm.\1."),
            (r"\bsmall\b", "0"),
            (r"\blarge\b", "1"),
        ),
        copies=((r"^(pos_embed|cls_token)_([01])$", r"\1.\2"),),  # timm's spelling
        signature=r"\.revert_projs\.",
    )

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 240,
        patch_sizes: tuple[int, int] = (12, 16),
        large_scale: tuple[int, int] = (14, 15),
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: tuple[int, int] = (192, 384),
        heads: tuple[int, int] = (6, 6),
        depths: tuple[int, int] = (1, 4),
        encoders: int = STAGES,
        mlp_ratio: float = 4.0,
        stem: str = "linear",
        fusion: str = "cross_attention",
        fusion_depth: int = 1,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        pairs = {"patch_sizes": patch_sizes, "large_scale": large_scale, "dims": dims, "heads": heads, "depths": depths}
        at_least(1, in_chans=in_chans, encoders=encoders, fusion_depth=fusion_depth, **pairs)
        for name, pair in pairs.items():
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise InputError(f"{name}={pair} are not two; give the small and the large branch a value each")
        small, large = (Branch(dim, count, mlp_ratio) for dim, count in zip(dims, heads, strict=True))
        check_heads(*small[:2])
        check_heads(*large[:2])
        fusion_cls, patches = choose(FUSIONS, fusion, "fusion"), choose(STEMS, stem, "stem")
        paths = rising_rates(drop_path_rate, encoders * max(depths))

        self.in_chans, self.num_classes = in_chans, num_classes
        self.embed_dim = dims
        self.num_features = self.head_hidden_size = sum(dims)
        self.img_size = image_size(img_size)
        self.scale_small, self.scale_large = ImageScale(patch_sizes[0]), ImageScale(patch_sizes[1], *large_scale)

        def embedding(branch: Branch, scale: ImageScale) -> TokenEmbedding:
            stem = patches(in_chans, branch.dim, scale.patch_size)
            return TokenEmbedding(stem, branch.dim, scale.grid(*self.img_size), pos_drop_rate)

        self.embed_small = embedding(small, self.scale_small)
        self.embed_large = embedding(large, self.scale_large)
        rates = Rates(attn_drop_rate, proj_drop_rate)
        self.stages = nn.ModuleList(
            Stage(small, large, depths, fusion_cls, fusion_depth, rates, paths[i * max(depths) : (i + 1) * max(depths)])
            for i in range(encoders)
        )
        self.norm_small: nn.Module = layer_norm(small.dim)
        self.norm_large: nn.Module = layer_norm(large.dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(init_linear_and_norm)
        self.head = self.build_head(num_classes)

    def build_head(self, num_classes: int) -> nn.Module:
        return TwoHeads(self.embed_dim, num_classes) if num_classes else nn.Identity()

    def embed(self, images: Tensor) -> tuple[Tensor, SmallBranch]:
        """Images (B, in_chans, H, W), each branch's at its own scale, to either branch's tokens (B, 1 + h·w, C)."""
        small, small_grid = self.embed_small(self.scale_small.resize(images))
        large, large_grid = self.embed_large(self.scale_large.resize(images))
        return large, SmallBranch(small, (small_grid, large_grid))

    def step(self, stage: nn.Module, large: Tensor, branch: SmallBranch) -> Tensor:
        """Either branch's tokens through one stage."""
        branch.tokens, large = self.run(stage, branch.tokens, large, branch.grids)
        return large

    def finish(self, large: Tensor, branch: SmallBranch) -> Pair:
        """Either branch's tokens to normed ones (B, 1 + h·w, C), CLS first."""
        return self.norm_small(branch.tokens), self.norm_large(large)

    def forward_head(self, features: Pair, pre_logits: bool = False) -> Tensor:
        """Either branch's normed tokens to logits (B, num_classes), or to both CLS tokens in a row (B, C + C')."""
        cls = self.head_drop(torch.cat([tokens[:, 0] for tokens in features], dim=1))
        return cls if pre_logits else self.head(cls)

    def feature_points(self) -> list[FeaturePoint]:
        """The patch tokens after each stage: the small branch's (0 to 2 of three stages), then the large one's."""
        scales = ("small", self.scale_small), ("large", self.scale_large)
        return [
            FeaturePoint(f"stages.{i}", dim, scale.reduction, prefix_tokens=1, norm=f"norm_{name}", output=branch)
            for branch, (dim, (name, scale)) in enumerate(zip(self.embed_dim, scales, strict=True))
            for i in range(len(self.stages))
        ]

    def branch_layouts(self, img_size: Grid | None = None) -> tuple[TokenLayout, TokenLayout]:
        """What each token of the small and of the large branch is."""
        size = img_size or self.img_size
        return (
            (TokenGroup("small_cls"), TokenGroup("small_patch", self.scale_small.grid(*size))),
            (TokenGroup("large_cls"), TokenGroup("large_patch", self.scale_large.grid(*size))),
        )

    def token_layout(self, img_size: Grid | None = None) -> TokenLayout:
        """What each token of `forward_features` is: the small branch's, then the large one's."""
        small, large = self.branch_layouts(img_size)
        return small + large

    def attention_layouts(self, img_size: Grid | None = None) -> dict[str, AttentionLayout]:
        layouts: dict[str, AttentionLayout] = {}
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            inside = stage.attention_layouts(*self.branch_layouts(img_size))
            layouts |= {f"stages.{i}.{name}": layout for name, layout in inside.items()}
        return layouts

    # as a backbone of a fusion: the large branch's tokens are those that fuse
    rigid = "its stages bring two branches together, each of its own tokens"

    @property
    def blocks(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        return tuple(self.stages)

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self.embed_dim[1]

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.stages[0].large[0].attn.heads  # type: ignore[index,union-attr]

    @property
    def reduction(self) -> Fraction:  # type: ignore[override]
        return self.scale_large.reduction

    def grid(self, size: Grid) -> Grid:
        return self.scale_large.grid(*size)

    def stream_layout(self, img_size: Grid | None = None) -> TokenLayout:
        return self.branch_layouts(img_size)[1]

    def layers(self) -> list[str]:
        rows = ["embed_"]
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            depth = max(len(stage.small), len(stage.large))
            blocks = [rf"(small|large)\.{j}" for j in range(depth)]
            blocks[-1] += "|fusion"
            rows += [rf"stages\.{i}\.({block})\." for block in blocks]
        return rows

    def no_weight_decay(self) -> set[str]:
        return {f"embed_{branch}.{name}" for branch in ("small", "large") for name in ("cls_token", "positions.table")}


TINY: dict[str, Any] = {"img_size": 240, "dims": (96, 192), "heads": (3, 3)}
SMALL: dict[str, Any] = {"img_size": 240, "dims": (192, 384), "heads": (6, 6)}
BASE: dict[str, Any] = {"img_size": 240, "dims": (384, 768), "heads": (12, 12)}
NINE: dict[str, Any] = {"img_size": 240, "dims": (128, 256), "heads": (4, 4), "depths": (1, 3), "mlp_ratio": 3.0}
FIFTEEN: dict[str, Any] = SMALL | {"depths": (1, 5), "mlp_ratio": 3.0}
EIGHTEEN: dict[str, Any] = {"img_size": 240, "dims": (224, 448), "heads": (7, 7), "depths": (1, 6), "mlp_ratio": 3.0}
DAGGER: dict[str, Any] = {"stem": "conv"}
LARGER: dict[str, Any] = {"img_size": 408, "large_scale": (16, 17)}
MICRO: dict[str, Any] = {"img_size": 32, "num_classes": 10, "patch_sizes": (4, 8), "large_scale": (1, 1)}
OFFICIAL: dict[str, tuple[type[CrossViT], dict[str, Any]]] = {
    "crossvit_tiny_224": (CrossViT, TINY),
    "crossvit_small_224": (CrossViT, SMALL),
    "crossvit_base_224": (CrossViT, BASE),
    "crossvit_9_224": (CrossViT, NINE),
    "crossvit_15_224": (CrossViT, FIFTEEN),
    "crossvit_18_224": (CrossViT, EIGHTEEN),
    "crossvit_9_dagger_224": (CrossViT, NINE | DAGGER),
    "crossvit_15_dagger_224": (CrossViT, FIFTEEN | DAGGER),
    "crossvit_18_dagger_224": (CrossViT, EIGHTEEN | DAGGER),
    "crossvit_15_dagger_384": (CrossViT, FIFTEEN | DAGGER | LARGER),
    "crossvit_18_dagger_384": (CrossViT, EIGHTEEN | DAGGER | LARGER),
}

VARIANTS = OFFICIAL | {
    "crossvit_micro": (CrossViT, MICRO | DAGGER | {"dims": (64, 128), "heads": (4, 4), "depths": (1, 2)}),
}


def config(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What timm knows of a variant; an official one's weights are timm's copy."""
    conv = ".0" if "stem" in arguments else ""
    layers = {
        "first_conv": (f"embed_small.patches{conv}", f"embed_large.patches{conv}"),
        "classifier": ("head.small", "head.large"),
    }
    if name not in OFFICIAL:
        return layers
    return layers | {
        "hf_hub_id": f"timm/{name.replace('_224', '_240').replace('_384', '_408')}.in1k",
        "crop_pct": 1.0 if arguments["img_size"] == 408 else 0.875,
        "interpolation": "bicubic",
        "license": "apache-2.0",
    }


CONFIGS = {name: config(name, arguments) for name, (_, arguments) in VARIANTS.items()}
LAST_STAGES = STAGES - 1, 2 * STAGES - 1
register_variants(__name__, VARIANTS, configs=CONFIGS, out_indices=LAST_STAGES, read_pretrained=read_pretrained)
