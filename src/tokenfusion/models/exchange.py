"""From a CNN's map to tokens and back, and the gates that scale updates.

Letters: B batch, P pixel tokens, C channels, h w grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.layers.blocks import layer_norm
from tokenfusion.layers.positions import Grid, PositionTable
from tokenfusion.layers.tokens import PixelTokens, size_of, tokens_to_map


class PixelSource(nn.Module):
    """P = tokens(M): a CNN's map projected, normalised, placed, and marked by a source embedding.

    Args:
        channels: channels of the map.
        dim: width C of a token.
        grid: rows and columns of the map that the positions are learned on.
    """

    def __init__(self, channels: int, dim: int, grid: Grid) -> None:
        super().__init__()
        self.pixels = PixelTokens(channels, dim)
        self.positions = PositionTable(dim, grid, prefix_tokens=0)
        self.source = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, 1, dim), std=0.02))

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map (B, channels, h, w) to tokens (B, P, C)."""
        return self.pixels(feature_map) + self.positions(size_of(feature_map)) + self.source


class Gate(nn.Module):
    """a·d: an update scaled channel by channel; nothing is left of it where the gate is 0, all where it is 1.

    Args:
        shape: of the gate: (C,) for tokens, (C, 1, 1) for maps.
        start: its value before training.
    """

    def __init__(self, shape: tuple[int, ...], start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, start))

    def forward(self, update: Tensor) -> Tensor:
        """An update to one of the same shape and type."""
        return (self.weight * update).to(update.dtype)


class WriteBack(nn.Module):
    """b·W(P): pixel tokens as a gated update of the map that they came from."""

    def __init__(self, dim: int, channels: int, gate: float) -> None:
        super().__init__()
        self.norm = layer_norm(dim)
        self.proj = nn.Linear(dim, channels)
        self.gate = Gate((channels, 1, 1), gate)

    def forward(self, pixels: Tensor, grid: Grid, size: Grid) -> Tensor:
        """Tokens (B, P, C) on `grid` to an update of a map of `size`, (B, channels, h, w)."""
        return self.gate(F.adaptive_avg_pool2d(tokens_to_map(self.proj(self.norm(pixels)), grid), size))


class ReadOut(nn.Module):
    """X + a mean(P): what the head reads of the pixels.

    A short way from the CNN to it: training would else have to bring the transformer to life first.
    """

    def __init__(self, dim: int, gate: float) -> None:
        super().__init__()
        self.gate = Gate((dim,), gate)

    def forward(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """X (B, T, C) and P (B, P, C) to the new X."""
        return tokens + self.gate(pixels.mean(dim=1, keepdim=True))


def coarser(one: Grid, other: Grid) -> Grid:
    """The fewer rows and the fewer columns of two grids."""
    return min(one[0], other[0]), min(one[1], other[1])
