"""A CNN's map and a transformer's tokens exchange what they know, through gates.

Letters: B batch, T tokens of the transformer, M pixel tokens, C channels, h w grid.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from tokenfusion.layers.blocks import layer_norm
from tokenfusion.layers.positions import Grid, PositionTable
from tokenfusion.layers.tokens import AttentionLayout, PixelTokens, TokenGroup, TokenLayout, size_of, tokens_to_map
from tokenfusion.models.operators import Grids, Operator


class PixelSource(nn.Module):
    """A CNN's map as tokens: projected, normalised, placed, and marked by a source embedding.

    Args:
        channels: channels of the map.
        dim: width C of a token.
        grid: rows and columns of the map that the positions are learned on.
    """

    def __init__(self, channels: int, dim: int, grid: Grid) -> None:
        super().__init__()
        self.pixels = PixelTokens(channels, dim)
        self.positions = PositionTable(dim, grid, prefix_tokens=0)
        self.source = nn.Parameter(trunc_normal_(torch.zeros(1, 1, dim), std=0.02))

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map (B, channels, h, w) to tokens (B, M, C)."""
        return self.pixels(feature_map) + self.positions(size_of(feature_map)) + self.source


class Gate(nn.Module):
    """What was alone where the gate is 0, what is fused where it is 1, channel by channel.

    Args:
        shape: of the gate: (C,) for tokens, (C, 1, 1) for maps.
        start: its value before training.
    """

    def __init__(self, shape: tuple[int, ...], start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, start))

    def forward(self, alone: Tensor, fused: Tensor) -> Tensor:
        """Two tensors of the same shape to one of it."""
        return torch.lerp(alone, fused.to(alone.dtype), self.weight.to(alone.dtype))


class WriteBack(nn.Module):
    """Pixel tokens back into the map that they came from, through a gate."""

    def __init__(self, dim: int, channels: int, gate: float) -> None:
        super().__init__()
        self.norm = layer_norm(dim)
        self.proj = nn.Linear(dim, channels)
        self.gate = Gate((channels, 1, 1), gate)

    def forward(self, pixels: Tensor, feature_map: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, M, C) on `grid` and the map (B, channels, h, w) to a new map."""
        update = F.adaptive_avg_pool2d(tokens_to_map(self.proj(self.norm(pixels)), grid), size_of(feature_map))
        return self.gate(feature_map, feature_map + update)


class Exchange(nn.Module):
    """A map's pixels become tokens, meet the transformer's, and both go home, each through a gate.

    A map finer than the patches is averaged to their grid first: attention among all pixels of an early stage would
    cost more than both parents together.

    Args:
        channels: channels of the map.
        operator: how the tokens meet.
        dim: width C of a token.
        grid: rows and columns of the pixel tokens that positions are learned on.
        gate: start of the gates; 0 leaves either side as it is alone, 1 opens them.
    """

    def __init__(self, channels: int, operator: Operator, dim: int, grid: Grid, gate: float) -> None:
        super().__init__()
        self.source = PixelSource(channels, dim, grid)
        self.operator = operator
        self.gate = Gate((dim,), gate)
        self.write = WriteBack(dim, channels, gate) if operator.writes else None

    def forward(self, tokens: Tensor, feature_map: Tensor, patches: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T, C), their patches on a grid, and a map (B, channels, h, w), to new ones and the pixels."""
        grids = Grids(patches, coarser(size_of(feature_map), patches))
        pixels = self.source(F.adaptive_avg_pool2d(feature_map, grids.pixels))
        fused, pixels = self.operator(tokens, pixels, grids)
        if self.write is not None:
            feature_map = self.write(pixels, feature_map, grids.pixels)
        return self.gate(tokens, fused), feature_map, pixels

    def attention_layouts(self, tokens: TokenLayout, grid: Grid) -> dict[str, AttentionLayout]:
        layouts = self.operator.attention_layouts(tokens, (TokenGroup("pixel", grid),))
        return {f"operator.{name}": layout for name, layout in layouts.items()}


def coarser(one: Grid, other: Grid) -> Grid:
    """The fewer rows and the fewer columns of two grids."""
    return min(one[0], other[0]), min(one[1], other[1])
