"""Learned position tables that fit any grid.

A table is learned on one grid and interpolated (bicubic) when the image is of another size or shape.

Letters: N query tokens, M key tokens, C channels, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.layers.tokens import map_to_tokens, tokens_to_map

Grid = tuple[int, int]  # rows, columns


def resize_grid(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Interpolate a table over a grid, (K, h·w, C), to another grid: (K, h'·w', C)."""
    if old == new:
        return table
    maps = tokens_to_map(table, old)
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))  # half precision has no bicubic kernel on CPUs
    maps = F.interpolate(wide, size=new, mode="bicubic", antialias=True, align_corners=False).to(table.dtype)
    return map_to_tokens(maps)


def square_grid(tokens: int) -> Grid | None:
    """The square grid of so many tokens; None if there is none."""
    side = math.isqrt(tokens)
    return (side, side) if side and side * side == tokens else None


class PositionTable(nn.Module):
    """One learned vector for each cell of a grid, and for each prefix token in front of it.

    Args:
        dim: width of a vector.
        grid: rows and columns the table is learned on.
        prefix_tokens: tokens in front of the grid's, such as CLS; they are never interpolated.
    """

    def __init__(self, dim: int, grid: Grid, prefix_tokens: int = 1) -> None:
        super().__init__()
        self.grid = grid
        self.prefix_tokens = prefix_tokens
        self.table = nn.Parameter(torch.zeros(1, prefix_tokens + grid[0] * grid[1], dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: Grid) -> Tensor:
        """The table for a grid: (1, prefix + h·w, C)."""
        return self._resize(self.table, self.grid, grid)

    def fit(self, table: Tensor) -> Tensor | None:
        """A table learned on another square grid, resized to this one's; None where that is not what it is."""
        old = square_grid(table.shape[1] - self.prefix_tokens) if table.ndim == 3 else None
        if old is None or table.shape[0] != 1 or table.shape[2] != self.table.shape[2]:
            return None
        return self._resize(table, old, self.grid)

    @torch.no_grad()
    def move_to(self, grid: Grid) -> None:
        """Make the table one that is learned on another grid."""
        self.table = nn.Parameter(self(grid).clone(), self.table.requires_grad)
        self.grid = grid

    def _resize(self, table: Tensor, old: Grid, new: Grid) -> Tensor:
        if old == new:
            return table
        prefix, cells = table[:, : self.prefix_tokens], table[:, self.prefix_tokens :]
        return torch.cat([prefix, resize_grid(cells, old, new)], dim=1)


class RelativePositionTable(nn.Module):
    """A learned bias for each head and each pair of a query's and a key's place, added to the attention's logits.

    Args:
        heads: number of attention heads.
        query_grid: rows and columns of the queries the table is learned on.
        key_grid: rows and columns of the keys, coarser than the queries' where keys are pooled.
    """

    def __init__(self, heads: int, query_grid: Grid, key_grid: Grid) -> None:
        super().__init__()
        self.query_grid, self.key_grid = query_grid, key_grid
        queries, keys = query_grid[0] * query_grid[1], key_grid[0] * key_grid[1]
        self.table = nn.Parameter(torch.randn(heads, queries, keys))

    def forward(self, query_grid: Grid, key_grid: Grid) -> Tensor:
        """The bias for these grids: (H, N, M)."""
        return self._resize(self.table, (self.query_grid, self.key_grid), (query_grid, key_grid))

    def fit(self, table: Tensor) -> Tensor | None:
        """A table learned on other square grids, resized to this one's; None where that is not what it is."""
        if table.ndim != 3 or table.shape[0] != self.table.shape[0]:
            return None
        queries, keys = square_grid(table.shape[1]), square_grid(table.shape[2])
        if queries is None or keys is None:
            return None
        return self._resize(table, (queries, keys), (self.query_grid, self.key_grid))

    @torch.no_grad()
    def move_to(self, query_grid: Grid, key_grid: Grid) -> None:
        """Make the table one that is learned on other grids."""
        self.table = nn.Parameter(self(query_grid, key_grid).clone(), self.table.requires_grad)
        self.query_grid, self.key_grid = query_grid, key_grid

    @staticmethod
    def _resize(table: Tensor, old: tuple[Grid, Grid], new: tuple[Grid, Grid]) -> Tensor:
        by_query = resize_grid(table, old[0], new[0])
        return resize_grid(by_query.transpose(1, 2), old[1], new[1]).transpose(1, 2)
