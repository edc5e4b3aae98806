"""CMT's parts (Guo et al., arXiv 2107.06263, section 3) and what the paper compares them with. The model is in `cmt`.

Letters: B batch, N tokens, M pooled tokens, C channels, H heads, D head width, h w grid.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.layers import LayerNorm2d, Mlp
from torch import Tensor, nn

from tokenfusion.layers.attend import Attend, SelfAttention, merge_heads, split_heads
from tokenfusion.layers.blocks import DepthwisePool, PaddedConv, drop_path, layer_norm
from tokenfusion.layers.fast import Linear
from tokenfusion.layers.fast_maps import (
    GELU,
    PointwiseConv,
    convolve_folded,
    convolve_normed,
    fold_into_depthwise,
    fold_into_product,
    folds,
    gelu_in_place,
    is_affine,
    more_pixels,
    product_between_norms,
)
from tokenfusion.layers.packed import PackedProduct, pack_parts
from tokenfusion.layers.positions import Grid, RelativePositionTable
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, grid_of, map_to_tokens, tokens_to_map
from tokenfusion.models.base import choose


class ConvStem(nn.Sequential):
    """Three 3×3 convolutions, the first of which may stride, each followed by GELU and BatchNorm."""

    def __init__(self, in_chans: int, dim: int, stride: int) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (chans, step) in enumerate(((in_chans, stride), (dim, 1), (dim, 1)), start=1):
            layers[f"conv{i}"] = nn.Conv2d(chans, dim, 3, stride=step, padding=1)
            layers[f"act{i}"] = GELU()
            layers[f"norm{i}"] = nn.BatchNorm2d(dim)
        super().__init__(layers)


class PatchEmbedding(nn.Module):
    """The entrance of a stage: a 2×2 convolution of stride 2, then LayerNorm over channels."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = PaddedConv(in_chans, dim, 2, stride=2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Grid]:
        """A map (B, in_chans, H, W) to tokens (B, h·w, C) and their grid, half as fine."""
        features = self.proj(features)
        return self.norm(map_to_tokens(features)), (features.shape[2], features.shape[3])


class LocalPerception(nn.Module):
    """LPU(X) = DWConv(X) + X, a depthwise 3×3 convolution (equation 1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        return features + self.conv(features)


class LightweightAttention(nn.Module):
    """LMHSA: softmax(Q K'ᵀ / √D + B) V', with Q of X, K' and V' of DWConv(X), k×k of stride k (equations 2 and 3).

    As in the official code a BatchNorm follows DWConv, and a projection the whole. B is the bias of relative positions,
    (heads, N, M) for N queries and M keys.

    Args:
        dim: width C of a token.
        heads: number of attention heads.
        pooling: k; with 1 nothing is pooled.
        attn_drop, proj_drop: dropout rates of the map and of the result.
    """

    def __init__(self, dim: int, heads: int, pooling: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.pool: nn.Module = nn.Identity()
        if pooling > 1:
            self.pool = nn.Sequential(DepthwisePool(dim, pooling), nn.BatchNorm2d(dim))
        self.attend = Attend(attn_drop)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @staticmethod
    def positions(heads: int, grid: Grid, pooling: int) -> nn.Module:
        """The stage's table of relative positions, shared by its blocks."""
        return RelativePositionTable(heads, grid, grid_of(grid, pooling))

    @staticmethod
    def layout(grid: Grid, pooling: int) -> AttentionLayout:
        """What the queries and keys are, for tokens on a grid."""
        queries = TokenGroup("patch", grid)
        keys = TokenGroup("pooled", grid_of(grid, pooling)) if pooling > 1 else queries
        return AttentionLayout((queries,), (keys,))

    def forward(self, tokens: Tensor, grid: Grid, bias: Tensor | None) -> Tensor:
        """Tokens (B, N, C) on a grid and the bias (H, N, M), if there is one, to (B, N, C)."""
        pooled = map_to_tokens(self.pool(tokens_to_map(tokens, grid)))
        queries, keys, values = self.q(tokens), self.k(pooled), self.v(pooled)
        heads = (split_heads(projected, self.heads) for projected in (queries, keys, values))
        return self.proj_drop(self.proj(merge_heads(self.attend(*heads, bias))))


class InvertedResidualFeedForward(nn.Module):
    """IRFFN(X) = Conv(F(Conv(X))),  F(X) = DWConv(X) + X: 1×1 up, depthwise 3×3, 1×1 down (equation 4)."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.expand = nn.Sequential(PointwiseConv(dim, hidden), GELU(), nn.BatchNorm2d(hidden))
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm = nn.Sequential(GELU(), nn.BatchNorm2d(hidden))
        self.project = nn.Sequential(PointwiseConv(hidden, dim), nn.BatchNorm2d(dim))
        self.drop = nn.Dropout(drop)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        if folds(self, features, self.expand[2], self.norm[1], self.project[1]):
            return self.infer_faster(features)
        hidden = self.drop(self.expand(features))
        hidden = self.norm(hidden + self.conv(hidden))
        return self.drop(self.project(hidden))

    def infer_faster(self, features: Tensor) -> Tensor:
        """The same by `layers/fast_maps.py`: the norms are part of the convolutions that follow and precede them."""
        hidden = gelu_in_place(self.expand[0](features))
        hidden = gelu_in_place(convolve_normed(self.expand[2], hidden, self.conv))
        return product_between_norms(self.norm[1], hidden, *self.project)

    def packed(self, kind: torch.dtype) -> nn.Module:
        """The same for inference alone, in float32 or bfloat16; see `layers/packed.py`."""
        affine = all(map(is_affine, (self.expand[2], self.norm[1], self.project[1])))
        return PackedFeedForward(self, kind) if affine else pack_parts(self, kind)


class PackedFeedForward(nn.Module):
    """`InvertedResidualFeedForward.infer_faster`, whose norms were folded into its convolutions beforehand."""

    def __init__(self, whole: InvertedResidualFeedForward, kind: torch.dtype) -> None:
        super().__init__()
        project: Any
        (_, _, self.norm), (_, self.norm_before), (project, self.norm_after) = whole.expand, whole.norm, whole.project
        with torch.no_grad():
            taps, bias, outside = fold_into_depthwise(self.norm, whole.conv)
            self.product = PackedProduct(*fold_into_product(self.norm_before, project, self.norm_after), kind)
        self.folded = taps.to(kind), bias.to(kind), outside.to(kind)
        parts: Any = pack_parts(whole, kind)
        self.expand, self.conv, self.project = parts.expand[0], parts.conv, parts.project[0]

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        hidden = gelu_in_place(self.expand(features))
        if more_pixels(hidden):
            hidden = gelu_in_place(convolve_folded(hidden, *self.folded))
            return self.product(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        hidden = gelu_in_place(convolve_normed(self.norm, hidden, self.conv))
        return product_between_norms(self.norm_before, hidden, self.project, self.norm_after)


class Parts(NamedTuple):
    """What a block is made of, by the names in the tables above, and its dropout rates."""

    local: str
    attention: str
    positions: str
    feed_forward: str
    mlp_ratio: float
    attn_drop: float
    proj_drop: float


class CMTBlock(nn.Module):
    """Y = LPU(X),  Z = LMHSA(LN(Y)) + Y,  X' = IRFFN(LN(Z)) + Z (equations 5 to 7).

    Args:
        dim, heads, pooling: as in `LightweightAttention`.
        parts: what the block is made of.
        path: rate of stochastic depth.
    """

    def __init__(self, dim: int, heads: int, pooling: int, parts: Parts, path: float) -> None:
        super().__init__()
        attention = choose(ATTENTIONS, parts.attention, "attention")
        feed_forward = choose(FEED_FORWARDS, parts.feed_forward, "feed_forward")
        self.local = choose(LOCAL, parts.local, "local")(dim)
        self.norm1 = layer_norm(dim)
        self.attn = attention(dim, heads, pooling, parts.attn_drop, parts.proj_drop)
        self.norm2 = layer_norm(dim)
        self.ffn = feed_forward(dim, int(dim * parts.mlp_ratio), parts.proj_drop)
        self.drop_path = drop_path(path)

    def forward(self, tokens: Tensor, grid: Grid, bias: Tensor | None) -> Tensor:
        """Tokens (B, N, C) on a grid, and the stage's bias, to (B, N, C)."""
        tokens = map_to_tokens(self.local(tokens_to_map(tokens, grid)))
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), grid, bias))
        update = self.ffn(tokens_to_map(self.norm2(tokens), grid))
        return tokens + self.drop_path(map_to_tokens(update))


# --- what the paper compares its parts with


def patch_stem(in_chans: int, dim: int, stride: int) -> nn.Module:
    """The stem without overlap: patches as large as the stride, each through one linear map."""
    return PaddedConv(in_chans, dim, stride, stride=stride)


class NoPositions(nn.Module):
    """The place of a table of relative positions, empty."""

    def forward(self, _query_grid: Grid, _key_grid: Grid) -> None:
        """No bias."""


class PlainAttention(nn.Module):
    """Self-attention over all tokens, neither pooled nor with positions: what LMHSA is compared with.

    Of the two, `pooling` of 1 takes away the first alone, and no `positions` the second.
    """

    def __init__(self, dim: int, heads: int, _pooling: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads, attn_drop, proj_drop)

    @staticmethod
    def positions(_heads: int, _grid: Grid, _pooling: int) -> nn.Module:
        """None."""
        return NoPositions()

    @staticmethod
    def layout(grid: Grid, _pooling: int) -> AttentionLayout:
        """What the queries and keys are, for tokens on a grid."""
        return AttentionLayout.among((TokenGroup("patch", grid),))

    def forward(self, tokens: Tensor, _grid: Grid, _bias: None) -> Tensor:
        """Tokens (B, N, C) to (B, N, C)."""
        return self.attention(tokens)


def plain_feed_forward(dim: int, hidden: int, drop: float = 0.0) -> nn.Module:
    """A transformer's MLP at every pixel: what IRFFN is compared with."""
    return Mlp(dim, hidden, drop=drop, use_conv=True)


class TokenBatchNorm(nn.Module):
    """BatchNorm in the place of a LayerNorm over tokens: each channel by its mean and variance over all tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        return self.norm(tokens.transpose(1, 2)).transpose(1, 2)


def all_batch_norm(model: nn.Module) -> None:
    """Put BatchNorm in the place of every LayerNorm of a model that is not trained yet."""
    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, nn.LayerNorm):
                setattr(module, name, TokenBatchNorm(part.normalized_shape[0]))


def all_layer_norm(model: nn.Module) -> None:
    """Put a LayerNorm over channels in the place of every BatchNorm of a model that is not trained yet."""
    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, nn.BatchNorm2d):
                setattr(module, name, LayerNorm2d(part.num_features))


STEMS = {"conv": ConvStem, "patch": patch_stem}
LOCAL: dict[str, type[nn.Module]] = {"lpu": LocalPerception, "none": nn.Identity}
ATTENTIONS: dict[str, Any] = {"lightweight": LightweightAttention, "plain": PlainAttention}
FEED_FORWARDS = {"inverted_residual": InvertedResidualFeedForward, "plain": plain_feed_forward}
POSITIONS: dict[str, Callable[..., nn.Module]] = {  # of a kind of attention, for its heads, grid and pooling
    "relative": lambda attention, *place: attention.positions(*place),
    "none": lambda *_: NoPositions(),
}
NORMS: dict[str, Callable[[nn.Module], None]] = {
    "mixed": lambda _: None,  # LayerNorm of tokens, BatchNorm behind convolutions
    "batch_norm": all_batch_norm,
    "layer_norm": all_layer_norm,
}
