"""Attention that two papers share.

Letters: B batch, N query tokens, M key tokens, C channels, H heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.layers.fast import Linear, prefers_products, softmax


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(B, N, H·D) to (B, H, N, D)."""
    batch, count, dim = tokens.shape
    return tokens.view(batch, count, heads, dim // heads).transpose(1, 2)


def merge_heads(tokens: Tensor) -> Tensor:
    """(B, H, N, D) to (B, N, H·D)."""
    return tokens.transpose(1, 2).flatten(2)


def check_heads(dim: int, heads: int) -> None:
    """Raise InputError unless `heads` divides `dim`."""
    if heads < 1 or dim % heads:
        fitting = max(h for h in range(1, max(heads, 1) + 1) if dim % h == 0)
        raise InputError(f"heads={heads} do not divide the width dim={dim}; try heads={fitting}")


def attention_map(queries: Tensor, keys: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D + bias) for (B, H, N, D) and (B, H, M, D): (B, H, N, M)."""
    logits = queries @ (keys * keys.shape[-1] ** -0.5).contiguous().transpose(-2, -1)  # keys: there may be fewer
    return softmax(logits if bias is None else logits + bias)


class Attend(nn.Module):
    """softmax(q kᵀ / √D + bias) v: fused, or explicitly, through the map.

    While `fused_attn` is true the fused kernel is free to be used, unless plain products are faster. When false, the
    map always passes through `attn_drop`, where it can be observed.

    Args:
        attn_drop: dropout rate of the map.
    """

    def __init__(self, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.fused_attn = True
        self.attn_drop = nn.Dropout(attn_drop)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, H, N, D), (B, H, M, D), (B, H, M, D), bias (H, N, M) or None, to (B, H, N, D)."""
        if not self.fused_attn or prefers_products(queries):
            return self.attn_drop(attention_map(queries, keys, bias)) @ values
        dropout = self.attn_drop.p if self.training else 0.0
        mask = None if bias is None else bias[None]  # the CPU's fused kernel takes four dimensions only
        if mask is not None and not torch.is_grad_enabled():
            mask = mask.detach()  # nor does it take a mask that might want a gradient
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)


class SelfAttention(nn.Module):
    """Self-attention of all tokens among themselves.

    Args:
        dim: width C of a token.
        heads: number of attention heads H.
        attn_drop, proj_drop: dropout rates of the map and of the result.
    """

    def __init__(self, dim: int, heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.attend = Attend(attn_drop)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        queries, keys, values = (split_heads(part, self.heads) for part in self.qkv(tokens).chunk(3, dim=2))
        return self.proj_drop(self.proj(merge_heads(self.attend(queries, keys, values))))
