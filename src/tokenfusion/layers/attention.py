"""Multi-head self-attention (Vaswani et al., arXiv 1706.03762, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, N, H·D) to (B, H, N, D)."""
    return tokens.reshape(*tokens.shape[:2], num_heads, -1).transpose(1, 2)


def merge_heads(heads: Tensor) -> Tensor:
    """(B, H, N, D) to (B, N, H·D)."""
    return heads.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √D) V, by whichever of the two ways is faster on the hardware at hand.

    That is PyTorch's fused attention, but for bfloat16 on a CPU, where plain products are: benchmarks/attention.py.

    Args:
        query: (B, H, N, D).
        key, value: (B, H, M, D).

    Returns:
        (B, H, N, D).
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return scores.softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Self-attention of N tokens among themselves.

    Args:
        dim: width of the tokens.
        num_heads: heads; must divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) to (B, N, dim)."""
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(tokens).chunk(3, dim=-1))
        return self.proj(merge_heads(attend(query, key, value)))
