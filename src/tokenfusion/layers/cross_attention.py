"""Attention in which some tokens ask others: the first token alone (CrossViT), or all of one source those of another.

Letters: B batch, N query tokens, M key tokens, C channels, H heads, D head width.
"""

import torch
from torch import Tensor, nn

from tokenfusion.layers.attend import Attend, infers, merge_heads, split_heads
from tokenfusion.layers.linear import Linear


class CrossAttention(nn.Module):
    """Tokens of one source ask those of another.

    Args:
        dim: width C of a token.
        heads: number of attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.attend = Attend()
        self.proj = Linear(dim, dim)

    def forward(self, tokens: Tensor, others: Tensor) -> Tensor:
        """(B, N, C) and those that are asked, (B, M, C), to (B, N, C)."""
        queries = split_heads(self.q(tokens), self.heads)
        keys, values = (split_heads(part, self.heads) for part in self.kv(others).chunk(2, dim=2))
        return self.proj(merge_heads(self.attend(queries, keys, values)))


class ClsCrossAttention(nn.Module):
    """Attention whose only query is the first token; the cost is linear in the number of tokens (equation 5).

    In inference no token is projected: for one query both projections can change places with the sums over tokens.
    With the query q_h of head h, its rows W_h and b_h of the keys' projection, V_h and c_h of the values', and the map
    a_h over the tokens x_n,

        q_h · (W_h x_n + b_h) = (W_hᵀ q_h) · x_n + constant,    Σ_n a_hn (V_h x_n + c_h) = V_h (Σ_n a_hn x_n) + c_h.

    The softmax does not see the constant. The multiply-adds for N tokens fall from 2NC² to 2C² + 2NHC.

    Args:
        dim: width C of a token.
        heads: number of attention heads.
        attn_drop, proj_drop: dropout rates of the map and of the result.
    """

    def __init__(self, dim: int, heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.attend = Attend(attn_drop)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C), the query first, to (B, 1, C)."""
        query = split_heads(self.q(tokens[:, :1]), self.heads)  # (B, H, 1, D)
        attend = self.attend_tokens if absorbs(self, tokens) else self.attend_projected
        return self.proj_drop(self.proj(merge_heads(attend(query, tokens))))

    def attend_projected(self, query: Tensor, tokens: Tensor) -> Tensor:
        """A query (B, H, 1, D) and tokens (B, N, C) to (B, H, 1, D), by every token's key and value."""
        keys, values = split_heads(self.k(tokens), self.heads), split_heads(self.v(tokens), self.heads)
        return self.attend(query, keys, values)

    def attend_tokens(self, query: Tensor, tokens: Tensor) -> Tensor:
        """The same, projecting the query and the mean token instead."""
        width, dim = query.shape[3], tokens.shape[2]
        by_key, by_value = (layer.weight.view(self.heads, width, dim) for layer in (self.k, self.v))
        wanted = by_heads(query.squeeze(2) * width**-0.5, by_key)  # (B, H, C)
        maps = self.attend.attn_drop((wanted @ tokens.transpose(1, 2)).softmax(dim=2).unsqueeze(2))  # (B, H, 1, N)
        mean = maps.squeeze(2) @ tokens  # (B, H, C)
        attended = by_heads(mean, by_value.transpose(1, 2)) + self.v.bias.view(self.heads, width)
        return attended.unsqueeze(2)


def by_heads(vectors: Tensor, matrices: Tensor) -> Tensor:
    """A vector for each head (B, H, I) through a matrix for each head (H, I, O): (B, H, O)."""
    return torch.bmm(vectors.transpose(0, 1), matrices).transpose(0, 1)


def absorbs(module: nn.Module, tokens: Tensor) -> bool:
    """Whether cross-attention is to project its query and its result instead of the tokens: in inference.

    Not on the meta device, where costs are counted: those are to be the paper's.
    """
    return infers(module) and not tokens.is_meta
