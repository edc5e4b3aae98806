# ruff: noqa: ARG002 - one signature, of which each operator uses what it needs
"""Fusion operators: how a transformer's tokens X and a CNN's pixel tokens P meet, by updates: (dX, dP) = op(X, P).

Letters: B batch, T tokens of the transformer (its prefix, CLS first, then patches row by row), P pixel tokens,
C channels, h w grid.
"""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.layers.attend import SelfAttention
from tokenfusion.layers.blocks import Block, layer_norm
from tokenfusion.layers.cross_attention import ClsCrossAttention, CrossAttention
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, TokenLayout, map_to_tokens, tokens_to_map


class Grids(NamedTuple):
    """Where the tokens stand: the patches' grid and the pixels'."""

    patches: Grid
    pixels: Grid


Updates = tuple[Tensor, Tensor | None]
QUERIES = 8
"""Learned queries of a query pool."""


class Operator(nn.Module):
    """What every operator answers.

    Attributes:
        updates: which tokens of the transformer it updates: "cls" (and others before the patches), "patch" or both.
        needs: which of them it cannot do without: "cls", or "" for none.
        writes: whether its update of the pixel tokens goes further than to the head: into the map or the next operator.

    Args:
        dim: width C of a token of either kind.
        heads: attention heads.
        mlp_ratio: hidden width of an MLP, in units of `dim`, where there is one.
        one_way: no CNN or operator reads the pixel tokens afterwards, the head their mean alone: give no dP. (Joint
            attention gives it all the same, since its block changes both kinds at once.)
    """

    updates: ClassVar[tuple[str, ...]] = ("cls", "patch")
    needs: ClassVar[str] = ""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, one_way: bool = False) -> None:
        super().__init__()
        self.writes = not one_way

    def forward(self, tokens: Tensor, pixels: Tensor, grids: Grids) -> Updates:
        """Tokens X (B, T, C) and pixel tokens P (B, P, C) to dX and dP of the same shapes; dP None for no update."""
        raise NotImplementedError

    def attention_layouts(self, tokens: TokenLayout, pixels: TokenLayout) -> dict[str, AttentionLayout]:
        """What each attention module's queries and keys are, by the module's name inside the operator."""
        return {}

    def shares(self, grids: Grids) -> tuple[Tensor | None, Tensor | None]:
        """What is added without attention: to each patch, shares of the pixels (h·w, P), and to each pixel, shares of
        the patches (P, h·w); rows that sum to 1, None for nothing."""
        return None, None


class JointAttention(Operator):
    """[dX; dP] = block([X; P]) - [X; P], a transformer block over all tokens."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, one_way: bool = False) -> None:
        super().__init__(dim, heads, mlp_ratio, one_way)
        self.block = Block(dim, SelfAttention(dim, heads), mlp_ratio)

    def forward(self, tokens: Tensor, pixels: Tensor, grids: Grids) -> Updates:
        both = torch.cat([tokens, pixels], dim=1)
        update = self.block(both) - both
        return update[:, : tokens.shape[1]], update[:, tokens.shape[1] :]

    def attention_layouts(self, tokens: TokenLayout, pixels: TokenLayout) -> dict[str, AttentionLayout]:
        return {"block.attn": AttentionLayout.among(tokens + pixels)}


class ClsAttention(Operator):
    """dX = [attention(CLS, [CLS; P]); 0], of normed tokens: CLS alone attends to the pixels, as in CrossViT (arXiv
    2103.14899, section 3.3), at a cost linear in their number."""

    updates = ("cls",)
    needs = "cls"

    def __init__(self, dim: int, heads: int, mlp_ratio: float, one_way: bool = False) -> None:
        super().__init__(dim, heads, mlp_ratio, one_way)
        self.writes = False
        self.norm = layer_norm(dim)
        self.attn = ClsCrossAttention(dim, heads)

    def forward(self, tokens: Tensor, pixels: Tensor, grids: Grids) -> Updates:
        cls = self.attn(self.norm(torch.cat([tokens[:, :1], pixels], dim=1)))
        return F.pad(cls, (0, 0, 0, tokens.shape[1] - 1)), None

    def attention_layouts(self, tokens: TokenLayout, pixels: TokenLayout) -> dict[str, AttentionLayout]:
        return {"attn": AttentionLayout(tokens[:1], tokens[:1] + pixels)}


class QueryPool(Operator):
    """dX = [W attention(Q, [X; P]); 0], of normed tokens: learned queries Q attend to both kinds, CLS is told."""

    updates = ("cls",)
    needs = "cls"

    def __init__(self, dim: int, heads: int, mlp_ratio: float, one_way: bool = False) -> None:
        super().__init__(dim, heads, mlp_ratio, one_way)
        self.writes = False
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, QUERIES, dim), std=0.02))
        self.norm = layer_norm(dim)
        self.attn = CrossAttention(dim, heads)
        self.proj = nn.Linear(QUERIES * dim, dim)

    def forward(self, tokens: Tensor, pixels: Tensor, grids: Grids) -> Updates:
        both = self.norm(torch.cat([tokens, pixels], dim=1))
        told = self.proj(self.attn(self.queries.expand(both.shape[0], -1, -1), both).flatten(1))
        return F.pad(told[:, None], (0, 0, 0, tokens.shape[1] - 1)), None

    def attention_layouts(self, tokens: TokenLayout, pixels: TokenLayout) -> dict[str, AttentionLayout]:
        return {"attn": AttentionLayout((TokenGroup("query", (1, QUERIES)),), tokens + pixels)}


class TwoWayAttention(Operator):
    """dX = attention(X, P),  dP = attention(P, X), of normed tokens: each kind attends to the other."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, one_way: bool = False) -> None:
        super().__init__(dim, heads, mlp_ratio, one_way)
        self.norm_tokens, self.norm_pixels = layer_norm(dim), layer_norm(dim)
        self.to_pixels = CrossAttention(dim, heads)
        self.to_tokens = CrossAttention(dim, heads) if self.writes else None

    def forward(self, tokens: Tensor, pixels: Tensor, grids: Grids) -> Updates:
        tokens, pixels = self.norm_tokens(tokens), self.norm_pixels(pixels)
        return self.to_pixels(tokens, pixels), self.to_tokens(pixels, tokens) if self.to_tokens is not None else None

    def attention_layouts(self, tokens: TokenLayout, pixels: TokenLayout) -> dict[str, AttentionLayout]:
        layouts = {"to_pixels": AttentionLayout(tokens, pixels)}
        return layouts | {"to_tokens": AttentionLayout(pixels, tokens)} if self.writes else layouts


class AlignedAddition(Operator):
    """dX = [0; P at the patches' places],  dP = the patches at the pixels' places."""

    updates = ("patch",)

    def forward(self, tokens: Tensor, pixels: Tensor, grids: Grids) -> Updates:
        prefix = tokens.shape[1] - grids.patches[0] * grids.patches[1]
        to_patches = F.pad(regrid(pixels, grids.pixels, grids.patches), (0, 0, prefix, 0))
        return to_patches, regrid(tokens[:, prefix:], grids.patches, grids.pixels) if self.writes else None

    def shares(self, grids: Grids) -> tuple[Tensor | None, Tensor | None]:
        def means(old: Grid, new: Grid) -> Tensor:
            return regrid(torch.eye(old[0] * old[1])[None], old, new)[0]

        return means(grids.pixels, grids.patches), means(grids.patches, grids.pixels) if self.writes else None


def regrid(tokens: Tensor, old: Grid, new: Grid) -> Tensor:
    """Tokens (B, h·w, C) of one grid as means of those that lie in each cell of another grid: (B, h'·w', C)."""
    if old == new:
        return tokens
    return map_to_tokens(F.adaptive_avg_pool2d(tokens_to_map(tokens, old), new))


OPERATORS: dict[str, type[Operator]] = {
    "joint": JointAttention,
    "cls": ClsAttention,
    "cross": TwoWayAttention,
    "add": AlignedAddition,
    "query": QueryPool,
}
