"""CrossViT's four ways to fuse two branches (Chen et al., arXiv 2103.14899, figure 3). The model is in `crossvit`.

Letters: B batch, N tokens, C channels, H heads, D head width, h w grid.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.layers.attend import SelfAttention
from tokenfusion.layers.blocks import drop_path, layer_norm
from tokenfusion.layers.cross_attention import ClsCrossAttention
from tokenfusion.layers.fast import Linear, in_full_precision
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import AttentionLayout, TokenLayout, map_to_tokens, tokens_to_map

Pair = tuple[Tensor, Tensor]
BranchGrids = tuple[Grid, Grid]


def project(dim: int, other: int) -> nn.Sequential:
    """LayerNorm, GELU, Linear: from one branch's width to the other's."""
    return nn.Sequential(layer_norm(dim), nn.GELU(), Linear(dim, other))


class Branch(NamedTuple):
    """Width, heads and MLP ratio of one branch."""

    dim: int
    heads: int
    mlp_ratio: float


class Rates(NamedTuple):
    """Dropout rates inside a stage."""

    attn_drop: float = 0.0
    proj_drop: float = 0.0


class ClsUpdate(nn.Module):
    """y + CA(norm([y; x'_patches])): a CLS token attends to a branch's patches and to itself (equation 4).

    Args:
        other: the branch that it attends to, of whose width it is.
        rates: dropout rates.
        path: rate of stochastic depth.
    """

    def __init__(self, other: Branch, rates: Rates, path: float) -> None:
        super().__init__()
        self.norm = layer_norm(other.dim)
        self.attn = ClsCrossAttention(other.dim, other.heads, *rates)
        self.drop_path = drop_path(path)

    def forward(self, cls: Tensor, patches: Tensor) -> Tensor:
        """CLS (B, 1, C) and patches (B, N, C) to CLS."""
        return cls + self.drop_path(self.attn(self.norm(torch.cat([cls, patches], dim=1))))


class CrossAttentionWay(nn.Module):
    """y = f(x_cls) + CA(norm([f(x_cls); x'_patches])),  z = [g(y); x_patches]: a branch's CLS token attends to the
    other branch's patches (figure 4, equations 4 and 6); f and g project to the other branch's width and back.

    Args:
        own: the branch whose CLS token attends.
        other: the branch that it attends to.
        rates: dropout rates.
        path: rate of stochastic depth.
        depth: cross-attentions one after another, each y of the one before to the same patches. (In IBM/CrossViT at
            25a3339 a second one sees the CLS token alone.)
    """

    def __init__(self, own: Branch, other: Branch, rates: Rates, path: float, depth: int = 1) -> None:
        super().__init__()
        self.project = project(own.dim, other.dim)
        self.norm = layer_norm(other.dim)
        self.attn = ClsCrossAttention(other.dim, other.heads, *rates)
        self.drop_path = drop_path(path)
        self.project_back = project(other.dim, own.dim)
        self.further = nn.ModuleList(ClsUpdate(other, rates, path) for _ in range(depth - 1))

    def forward(self, tokens: Tensor, other: Tensor) -> Tensor:
        """Tokens of the branch and of the other, (B, 1 + N, C) each, to the branch's with a new CLS token."""
        cls, patches = self.project(tokens[:, :1]), other[:, 1:]
        cls = cls + self.drop_path(self.attn(self.norm(torch.cat([cls, patches], dim=1))))
        for update in self.further:
            cls = update(cls, patches)
        return torch.cat([self.project_back(cls), tokens[:, 1:]], dim=1)


class Fusion(nn.Module):
    """Two branches' tokens in, the same out, fused.

    Args:
        small, large: the branches.
        rates: dropout rates.
        path: rate of stochastic depth.
        depth: cross-attentions one after another, of cross-attention alone.

    Raises:
        InputError: a depth that the fusion does not have.
    """

    def __init__(self, small: Branch, large: Branch, rates: Rates, path: float, depth: int = 1) -> None:  # noqa: ARG002
        super().__init__()
        if depth != 1 and not isinstance(self, CrossAttentionFusion):
            raise InputError(
                f"fusion_depth={depth} is of cross-attention alone; give fusion=cross_attention, or leave it out"
            )

    def attention_layouts(self, _small: TokenLayout, _large: TokenLayout) -> dict[str, AttentionLayout]:
        """What each attention's queries and keys are, by name, of branches laid out as [CLS; patches]."""
        return {}


class CrossAttentionFusion(Fusion):
    """Fusion (d), the one kept: each branch's CLS token attends to the other branch's patches."""

    def __init__(self, small: Branch, large: Branch, rates: Rates, path: float, depth: int = 1) -> None:
        super().__init__(small, large, rates, path, depth)
        self.small = CrossAttentionWay(small, large, rates, path, depth)
        self.large = CrossAttentionWay(large, small, rates, path, depth)

    def forward(self, small: Tensor, large: Tensor, _grids: BranchGrids) -> Pair:
        """Tokens (B, 1 + N, C) of either branch to the same, fused."""
        with in_full_precision(self, small):
            return self.small(small, large), self.large(large, small)

    def attention_layouts(self, small: TokenLayout, large: TokenLayout) -> dict[str, AttentionLayout]:
        from_small = AttentionLayout(small[:1], small[:1] + large[1:])
        from_large = AttentionLayout(large[:1], large[:1] + small[1:])
        layouts = {"small.attn": from_small, "large.attn": from_large}
        for i in range(len(self.small.further)):
            layouts |= {f"small.further.{i}.attn": from_small, f"large.further.{i}.attn": from_large}
        return layouts


class NoFusion(Fusion):
    """None: each branch goes on alone, and only the mean of their logits brings them together."""

    def forward(self, small: Tensor, large: Tensor, _grids: BranchGrids) -> Pair:
        """Tokens (B, 1 + N, C) of either branch as they are."""
        return small, large


class ProjectedFusion(Fusion):
    """What fusions (a) to (c) share: both branches projected to the large one's width, and back."""

    def __init__(self, small: Branch, large: Branch, rates: Rates, path: float, depth: int = 1) -> None:
        super().__init__(small, large, rates, path, depth)
        self.project_small, self.back_small = project(small.dim, large.dim), project(large.dim, small.dim)
        self.project_large, self.back_large = project(large.dim, large.dim), project(large.dim, large.dim)


class AllAttentionFusion(ProjectedFusion):
    """Fusion (a): one self-attention over all tokens of both branches."""

    def __init__(self, small: Branch, large: Branch, rates: Rates, path: float, depth: int = 1) -> None:
        super().__init__(small, large, rates, path, depth)
        self.norm = layer_norm(large.dim)
        self.attn = SelfAttention(large.dim, large.heads, *rates)
        self.drop_path = drop_path(path)

    def forward(self, small: Tensor, large: Tensor, _grids: BranchGrids) -> Pair:
        """Tokens (B, 1 + N, C) of either branch to the same, fused."""
        tokens = torch.cat([self.project_small(small), self.project_large(large)], dim=1)
        tokens = tokens + self.drop_path(self.attn(self.norm(tokens)))
        small, large = tokens.split([small.shape[1], large.shape[1]], dim=1)
        return self.back_small(small), self.back_large(large)

    def attention_layouts(self, small: TokenLayout, large: TokenLayout) -> dict[str, AttentionLayout]:
        return {"attn": AttentionLayout.among(small + large)}


class ClsSumFusion(ProjectedFusion):
    """Fusion (b): the CLS tokens are summed, the patches stay."""

    def forward(self, small: Tensor, large: Tensor, _grids: BranchGrids) -> Pair:
        """Tokens (B, 1 + N, C) of either branch to the same, fused."""
        cls = self.project_small(small[:, :1]) + self.project_large(large[:, :1])
        return (
            torch.cat([self.back_small(cls), small[:, 1:]], dim=1),
            torch.cat([self.back_large(cls), large[:, 1:]], dim=1),
        )


class PairwiseFusion(ProjectedFusion):
    """Fusion (c): CLS tokens summed, and tokens at the same place summed, one grid interpolated to the other."""

    def forward(self, small: Tensor, large: Tensor, grids: BranchGrids) -> Pair:
        """Tokens (B, 1 + N, C) of either branch to the same, fused."""
        from_small, from_large = self.project_small(small), self.project_large(large)
        small_grid, large_grid = grids
        return (
            self.back_small(from_small + interpolate_patches(from_large, large_grid, small_grid)),
            self.back_large(from_large + interpolate_patches(from_small, small_grid, large_grid)),
        )


def interpolate_patches(tokens: Tensor, old: Grid, new: Grid) -> Tensor:
    """[CLS; h·w tokens] to [CLS; h'·w' tokens], interpolated bilinearly."""
    patches = F.interpolate(tokens_to_map(tokens[:, 1:], old), size=new, mode="bilinear", align_corners=False)
    return torch.cat([tokens[:, :1], map_to_tokens(patches)], dim=1)


FUSIONS: dict[str, type[Fusion]] = {
    "all_attention": AllAttentionFusion,
    "cls_sum": ClsSumFusion,
    "pairwise": PairwiseFusion,
    "cross_attention": CrossAttentionFusion,
    "none": NoFusion,
}
