"""Images and feature maps as tokens, where the tokens stand, and what each of them is."""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import NamedTuple, Self

from torch import Tensor, nn


@dataclass(frozen=True)
class TokenGroup:
    """Consecutive tokens of one source.

    Attributes:
        source: "cls", "patch" or "pixel"; CrossViT tells its branches apart, as in "small_cls" and "large_patch";
            "pooled" for CMT's keys, each of which stands for a cell of patches; "query" for learned queries, which
            CLS, the first of their keys, is told the answers of.
        grid: rows and columns that the tokens fill, row by row; None for tokens without a place.
        count: number of tokens.
    """

    source: str
    grid: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1] if self.grid else 1


TokenLayout = tuple[TokenGroup, ...]


class AttentionLayout(NamedTuple):
    """What the rows and the columns of an attention map are.

    Attributes:
        queries: the tokens that attend.
        keys: the tokens that they attend to.
    """

    queries: TokenLayout
    keys: TokenLayout

    @classmethod
    def among(cls, tokens: TokenLayout) -> Self:
        """Self-attention's: all attend to all."""
        return cls(tokens, tokens)


def num_prefix_tokens(layout: TokenLayout) -> int:
    """Tokens before the first one that has a place in the image."""
    return next(i for i, group in enumerate(layout) if group.grid)


def size_of(images: Tensor) -> tuple[int, int]:
    """Height and width of images or maps (..., H, W)."""
    height, width = images.shape[-2:]
    return height, width


def grid_of(size: tuple[int, int], reduction: int | Fraction) -> tuple[int, int]:
    """Rows and columns left of an image (H, W) by strides of `reduction` in all, edges padded."""
    return ceil(size[0] / reduction), ceil(size[1] / reduction)


def map_to_tokens(feature_map: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h·w, C), row by row."""
    return feature_map.flatten(2).transpose(1, 2)


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h·w, C), row by row, to (B, C, h, w)."""
    return tokens.transpose(1, 2).reshape(*tokens.shape[::2], *grid)


class PixelTokens(nn.Module):
    """Every pixel of a CNN's feature map as a token: projected to the transformer's width and normalised.

    Args:
        channels: channels of the feature map.
        dim: width of the tokens.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, feature_map: Tensor) -> Tensor:
        """(B, channels, h, w) to (B, h·w, dim)."""
        return self.norm(self.proj(map_to_tokens(feature_map)))
