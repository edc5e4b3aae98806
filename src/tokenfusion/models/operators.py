# ruff: noqa: ARG002 - one signature, of which each operator uses what it needs
"""Fusion operators: how a transformer's tokens and a CNN's pixel tokens meet, all with one signature.

Letters: B batch, T tokens of the transformer (its prefix, CLS first, then patches row by row), M pixel tokens,
C channels, h w grid.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.layers.attend import SelfAttention
from tokenfusion.layers.blocks import Block, layer_norm
from tokenfusion.layers.cross_attention import ClsCrossAttention, CrossAttention
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import AttentionLayout, TokenLayout, map_to_tokens, tokens_to_map


class Grids(NamedTuple):
    """Where the tokens stand: the patches' grid and the pixels'."""

    patches: Grid
    pixels: Grid


class Operator(nn.Module):
    """What every operator answers.

    Attributes:
        writes: whether the pixel tokens change too.

    Args:
        dim: width C of a token of either kind.
        heads: attention heads.
        mlp_ratio: hidden width of an MLP, in units of `dim`, where there is one.
        one_way: leave the pixel tokens as they are, since no CNN or operator reads them afterwards, the head their mean
            alone. (Self-attention changes both kinds at once.)
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, one_way: bool = False) -> None:
        super().__init__()
        self.writes = not one_way

    def forward(self, tokens: Tensor, pixels: Tensor, grids: Grids) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) and pixel tokens (B, M, C) to new ones of the same shapes."""
        raise NotImplementedError

    def attention_layouts(self, tokens: TokenLayout, pixels: TokenLayout) -> dict[str, AttentionLayout]:
        """What each attention module's queries and keys are, by the module's name inside the operator."""
        return {}


class JointAttention(Operator):
    """Self-attention of all tokens among themselves: a transformer block over [tokens; pixels]."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, one_way: bool = False) -> None:
        super().__init__(dim, heads, mlp_ratio, one_way)
        self.block = Block(dim, SelfAttention(dim, heads), mlp_ratio)

    def forward(self, tokens: Tensor, pixels: Tensor, grids: Grids) -> tuple[Tensor, Tensor]:
        count = tokens.shape[1]
        both = self.block(torch.cat([tokens, pixels], dim=1))
        return both[:, :count], both[:, count:]

    def attention_layouts(self, tokens: TokenLayout, pixels: TokenLayout) -> dict[str, AttentionLayout]:
        return {"block.attn": AttentionLayout.among(tokens + pixels)}


class ClsAttention(Operator):
    """CLS asks [CLS; pixels], as CrossViT's branches do (arXiv 2103.14899, section 3.3): linear in the pixels."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, one_way: bool = False) -> None:
        super().__init__(dim, heads, mlp_ratio, one_way)
        self.writes = False
        self.norm = layer_norm(dim)
        self.attn = ClsCrossAttention(dim, heads)

    def forward(self, tokens: Tensor, pixels: Tensor, grids: Grids) -> tuple[Tensor, Tensor]:
        cls = tokens[:, :1]
        cls = cls + self.attn(self.norm(torch.cat([cls, pixels], dim=1)))
        return torch.cat([cls, tokens[:, 1:]], dim=1), pixels

    def attention_layouts(self, tokens: TokenLayout, pixels: TokenLayout) -> dict[str, AttentionLayout]:
        return {"attn": AttentionLayout(tokens[:1], tokens[:1] + pixels)}


class TwoWayAttention(Operator):
    """Each kind of token asks the other."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, one_way: bool = False) -> None:
        super().__init__(dim, heads, mlp_ratio, one_way)
        self.norm_tokens, self.norm_pixels = layer_norm(dim), layer_norm(dim)
        self.ask_pixels = CrossAttention(dim, heads)
        self.ask_tokens = CrossAttention(dim, heads) if self.writes else None

    def forward(self, tokens: Tensor, pixels: Tensor, grids: Grids) -> tuple[Tensor, Tensor]:
        normed, normed_pixels = self.norm_tokens(tokens), self.norm_pixels(pixels)
        tokens = tokens + self.ask_pixels(normed, normed_pixels)
        if self.ask_tokens is not None:
            pixels = pixels + self.ask_tokens(normed_pixels, normed)
        return tokens, pixels

    def attention_layouts(self, tokens: TokenLayout, pixels: TokenLayout) -> dict[str, AttentionLayout]:
        layouts = {"ask_pixels": AttentionLayout(tokens, pixels)}
        return layouts | {"ask_tokens": AttentionLayout(pixels, tokens)} if self.writes else layouts


class AlignedAddition(Operator):
    """Tokens at the same place are added; between grids of different sizes, means and repetitions."""

    def forward(self, tokens: Tensor, pixels: Tensor, grids: Grids) -> tuple[Tensor, Tensor]:
        prefix = tokens.shape[1] - grids.patches[0] * grids.patches[1]
        patches = tokens[:, prefix:]
        seen = torch.cat([tokens[:, :prefix], patches + regrid(pixels, grids.pixels, grids.patches)], dim=1)
        return seen, pixels + regrid(patches, grids.patches, grids.pixels) if self.writes else pixels


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
}
