"""How transformers of timm and of this package are walked, block by block.

Letters: B batch, T tokens of a transformer (its prefix, CLS first, then patches row by row), C channels, h w grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.layers import PatchDropout
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.layers.intermediates import FeaturePoint
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, TokenLayout, grid_of
from tokenfusion.models.base import PaperModel
from tokenfusion.models.transformer import PlainTransformer

Run = Callable[..., Any]


class Walk:
    """How a kind of transformer is walked; it holds no module, so that a copied model walks its own.

    Attributes:
        reduction: side of a patch in pixels.
        rigid: why no further tokens can pass through the blocks; "" where they can.
        prefix: what the tokens before the patches are.
        reads_cls: whether the head reads CLS, rather than the mean of the patches.
    """

    reduction: int
    rigid: str = ""
    reads_cls: bool = True

    def __init__(self, vit: Any) -> None:
        self.dim: int = vit.embed_dim
        self.heads: int = vit.blocks[0].attn.heads
        self.prefix_tokens, self.prefix = 1, ["cls"]
        self.reduction = vit.patch_size

    def blocks(self, vit: Any) -> Sequence[nn.Module]:
        """What is walked."""
        return vit.blocks

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Any]:
        """Images (B, in_chans, H, W) to the tokens that fuse (B, T, C), and what else the blocks take."""
        return vit.embed(images)[0], ()

    def step(self, run: Run, block: nn.Module, tokens: Tensor, others: Any) -> tuple[Tensor, Any]:
        """A block, called through `run`."""
        return run(block, tokens, *others), others

    def finish(self, vit: Any, tokens: Tensor, others: Any) -> Any:  # noqa: ARG002
        """What `vit.forward_head` reads."""
        return vit.norm(tokens)

    def grid(self, size: Grid) -> Grid:
        """Rows and columns of the patches of images (H, W)."""
        return grid_of(size, self.reduction)

    def feature_points(self, name: str, vit: Any) -> list[FeaturePoint]:
        """Where the intermediate features of a transformer called `name` are taken: after each block."""
        return [
            FeaturePoint(f"{name}.blocks.{i}", self.dim, self.reduction, self.prefix_tokens, f"{name}.norm")
            for i in range(len(vit.blocks))
        ]

    def layout(self, vit: Any, size: Grid) -> TokenLayout:
        """What each of the tokens that fuse is."""
        return vit.token_layout(size)

    def attention_layouts(self, vit: Any, size: Grid) -> dict[str, AttentionLayout]:
        """What the transformer's own attention modules see when it is alone, by name."""
        return vit.attention_layouts(size)


class TimmWalk(Walk):
    """timm's VisionTransformer, and so ViT, DeiT, DINOv2, CLIP's and SigLIP's."""

    def __init__(self, vit: Any) -> None:
        self.dim, self.prefix_tokens = vit.embed_dim, vit.num_prefix_tokens
        self.heads = vit.blocks[0].attn.num_heads
        self.reduction = vit.patch_embed.feat_ratio(as_scalar=True)
        self.pads = getattr(vit.patch_embed, "dynamic_img_pad", False)
        self.reads_cls = vit.global_pool == "token"
        known = ["cls"] * (vit.cls_token is not None) + ["dist"] * hasattr(vit, "dist_token")
        self.prefix = [*known, *["register"] * (self.prefix_tokens - len(known))]

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Any]:
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))), ()

    def grid(self, size: Grid) -> Grid:
        return super().grid(size) if self.pads else (size[0] // self.reduction, size[1] // self.reduction)

    def layout(self, vit: Any, size: Grid) -> TokenLayout:  # noqa: ARG002
        return *map(TokenGroup, self.prefix), TokenGroup("patch", self.grid(size))

    def attention_layouts(self, vit: Any, size: Grid) -> dict[str, AttentionLayout]:
        layout = AttentionLayout.among(self.layout(vit, size))
        return {f"blocks.{i}.attn": layout for i in range(len(vit.blocks))}


class BeitWalk(TimmWalk):
    """timm's BEiT: its attention adds a bias for each pair of places."""

    rigid = "its attention has a bias for each pair of its own tokens"

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Any]:
        patches = vit.patch_embed(images)
        tokens = torch.cat([vit.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = vit.pos_drop(tokens if vit.pos_embed is None else tokens + vit.pos_embed)
        return tokens, () if vit.rel_pos_bias is None else (vit.rel_pos_bias(),)


class EvaWalk(TimmWalk):
    """timm's EVA: its attention turns queries and keys by their places."""

    rigid = "its attention turns each of its own tokens by its place"

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Any]:
        tokens, rope = vit._pos_embed(vit.patch_embed(images))
        return vit.norm_pre(tokens), () if rope is None else (rope,)


class CrossViTWalk(Walk):
    """This package's CrossViT: the large branch's tokens fuse, and its stages take both branches on."""

    rigid = "its stages bring two branches together, each of its own tokens"

    def __init__(self, vit: Any) -> None:
        self.dim, self.prefix_tokens, self.prefix = vit.embed_dim[1], 1, ["cls"]
        self.heads = vit.stages[0].large[0].attn.heads
        self.reduction = vit.scale_large.reduction
        self.scale = vit.scale_large

    def blocks(self, vit: Any) -> Sequence[nn.Module]:
        return vit.stages

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Any]:
        small, large, grids = vit.embed(images)
        return large, (small, grids)

    def step(self, run: Run, block: nn.Module, tokens: Tensor, others: Any) -> tuple[Tensor, Any]:
        small, grids = others
        small, large = run(block, small, tokens, grids)
        return large, (small, grids)

    def finish(self, vit: Any, tokens: Tensor, others: Any) -> Any:
        return vit.norm_small(others[0]), vit.norm_large(tokens)

    def grid(self, size: Grid) -> Grid:
        return self.scale.grid(*size)

    def feature_points(self, name: str, vit: Any) -> list[FeaturePoint]:
        return [replace(p, module=f"{name}.{p.module}", norm=f"{name}.{p.norm}") for p in vit.feature_points()]

    def layout(self, vit: Any, size: Grid) -> TokenLayout:
        return vit.branch_layouts(size)[1]


def walk_transformer(vit: nn.Module) -> Walk:
    """How to walk a transformer.

    Raises:
        InputError: it has no row of blocks over [CLS; patches] that this package knows how to walk.
    """
    if isinstance(vit, PlainTransformer):
        return Walk(vit)
    if isinstance(vit, VisionTransformer | Beit | Eva):
        return walk_timm(vit)
    if isinstance(vit, PaperModel) and hasattr(vit, "branch_layouts"):
        return CrossViTWalk(vit)
    raise InputError(
        f"a {type(vit).__name__} is none of the transformers whose blocks are walked; "
        "take a ViT, DeiT, BEiT or EVA of timm's, or deepvit_*, crossvit_* or vit_micro"
    )


def walk_timm(vit: Any) -> Walk:
    """How to walk one of timm's transformers."""
    reasons = {
        "its blocks hold several attentions side by side": not hasattr(vit.blocks[0], "attn"),
        "its head asks the tokens by an attention of its own": isinstance(getattr(vit, "attn_pool", None), nn.Module),
        "it drops patches while it trains, so that none has a place": isinstance(
            getattr(vit, "patch_drop", None), PatchDropout
        ),
        "its rotary positions differ from block to block": getattr(vit, "rope_mixed", False),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"this {type(vit).__name__} cannot be walked: {reason}; take a plain ViT, DeiT, BEiT or EVA"
            )
    walks: dict[type, type[Walk]] = {Beit: BeitWalk, Eva: EvaWalk}
    walk = next((walk for kind, walk in walks.items() if isinstance(vit, kind)), TimmWalk)
    return walk(vit)
