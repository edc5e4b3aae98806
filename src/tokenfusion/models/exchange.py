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

    def forward(self, feature_map: Tensor, kept: Tensor | None = None) -> Tensor:
        """Map (B, channels, h, w) to tokens (B, P, C): all 0 of the images that `kept` (B, 1, 1) is 0 for."""
        return kept_of(self.pixels(feature_map) + self.positions(size_of(feature_map)) + self.source, kept)


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


def draw_branches(images: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Which images keep their patches, and which their pixels, with branch dropout: never is both taken away.

    Args:
        images: (B, ...), for their number and device.
        rate: share of the images that lose one of the two, either as often as the other.

    Returns:
        1 where an image keeps its patches, else 0, and the same of its pixels: (B, 1, 1) each.
    """
    lots = torch.rand(len(images), 1, 1, device=images.device)
    return (lots >= rate / 2).float(), (lots < 1 - rate / 2).float()


def kept_of(tokens: Tensor, kept: Tensor | None) -> Tensor:
    """Tokens (B, T, C), all 0 of the images that `kept` (B, 1, 1) is 0 for."""
    return tokens if kept is None else tokens * kept.to(tokens.dtype)


def coarser(one: Grid, other: Grid) -> Grid:
    """The fewer rows and the fewer columns of two grids."""
    return min(one[0], other[0]), min(one[1], other[1])
