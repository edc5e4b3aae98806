"""Blocks of a plain vision transformer that two papers use unchanged.

Letters: B batch, N tokens, C channels, h w grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.layers.fast import Linear
from tokenfusion.layers.fast_maps import lies_by_pixel, pool_cells
from tokenfusion.layers.positions import Grid, PositionTable
from tokenfusion.layers.tokens import map_to_tokens


def layer_norm(dim: int) -> nn.LayerNorm:
    """The papers' LayerNorm: ε is 1e-6, not PyTorch's 1e-5."""
    return nn.LayerNorm(dim, eps=1e-6)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382): in training an image's update is left out at a rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, update: Tensor) -> Tensor:
        """(B, ...) to the same, scaled so that the mean stays."""
        if not self.training:
            return update
        kept = update.new_empty(len(update), *[1] * (update.ndim - 1)).bernoulli_(1 - self.rate)
        return update * (kept.div_(1 - self.rate) if self.rate < 1 else kept)


def drop_path(rate: float) -> nn.Module:
    """Stochastic depth, or nothing where the rate is 0."""
    return DropPath(rate) if rate else nn.Identity()


def rising_rates(last: float, count: int) -> list[float]:
    """Stochastic depth's rates for `count` blocks, from 0 at the first to `last` at the last one."""
    return [last * i / max(count - 1, 1) for i in range(count)]


def pad_to_multiple(feature_map: Tensor, cell: int) -> Tensor:
    """Zeros at the bottom and the right of (B, C, h, w), until `cell` divides both sides."""
    bottom, right = (-side % cell for side in feature_map.shape[-2:])
    return F.pad(feature_map, (0, right, 0, bottom)) if bottom or right else feature_map


class PaddedConv(nn.Conv2d):
    """A convolution whose stride is its kernel, over a map padded to whole cells."""

    def forward(self, feature_map: Tensor) -> Tensor:
        return super().forward(pad_to_multiple(feature_map, self.stride[0]))


class DepthwisePool(PaddedConv):
    """One weighted mean of each channel for each cell of a map: a depthwise k×k convolution of stride k."""

    def __init__(self, dim: int, cell: int) -> None:
        super().__init__(dim, dim, cell, stride=cell, groups=dim)

    def forward(self, feature_map: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, ⌈h/k⌉, ⌈w/k⌉)."""
        padded = pad_to_multiple(feature_map, self.stride[0])
        if self.bias is None or not torch.is_grad_enabled() or not lies_by_pixel(padded):
            return super().forward(padded)
        return pool_cells(padded, self.weight, self.bias)


class TokenEmbedding(nn.Module):
    """[CLS; patches] + positions.

    Args:
        patches: turns images (B, in_chans, H, W) into a map (B, C, h, w).
        dim: width C of a token.
        grid: rows and columns of the map that the positions are learned on.
        drop: dropout rate after the positions are added.
    """

    def __init__(self, patches: nn.Module, dim: int, grid: Grid, drop: float = 0.0) -> None:
        super().__init__()
        self.patches = patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = PositionTable(dim, grid, prefix_tokens=1)
        self.drop = nn.Dropout(drop)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Tokens (B, 1 + h·w, C) and the grid (h, w) of those after CLS."""
        features = self.patches(images)
        grid = (features.shape[2], features.shape[3])
        cls = self.cls_token.expand(features.shape[0], -1, -1)
        tokens = torch.cat([cls, map_to_tokens(features)], dim=1) + self.positions(grid)
        return self.drop(tokens), grid


class Mlp(nn.Sequential):
    """Linear, GELU, linear.

    Args:
        dim: width of the input and of the output.
        hidden: width between.
        drop: dropout rate after either linear layer.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        dim: width C of a token.
        attention: a module from (B, N, C) to (B, N, C).
        mlp_ratio: hidden width of the MLP, in units of `dim`.
        drop: dropout rate in the MLP.
        path: rate of stochastic depth of either branch.
    """

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, drop: float = 0.0, path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = attention
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = drop_path(path)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


def init_linear_and_norm(module: nn.Module) -> None:
    """ViT's initialisation, for `Module.apply`: truncated normal of σ 0.02, biases 0, norms at identity."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
