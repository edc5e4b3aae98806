"""Attention between two kinds of tokens: all of one source to another's, or the first token alone to all (CrossViT).

Letters: B batch, N query tokens, M key tokens, C channels, H heads, D head width.
"""

from torch import Tensor, nn

from tokenfusion.layers.attend import Attend, merge_heads, split_heads
from tokenfusion.layers.fast import Linear, absorbs, attend_by_one


class CrossAttention(nn.Module):
    """softmax(Q Kᵀ / √D) V, with Q of the tokens of one source, K and V of those of another.

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
        """(B, N, C) and those that they attend to, (B, M, C), to (B, N, C)."""
        queries = split_heads(self.q(tokens), self.heads)
        keys, values = (split_heads(part, self.heads) for part in self.kv(others).chunk(2, dim=2))
        return self.proj(merge_heads(self.attend(queries, keys, values)))


class ClsCrossAttention(nn.Module):
    """softmax(q Kᵀ / √D) V with q = x_cls W_q,  K = x W_k,  V = x W_v: the first token is the only query (CrossViT,
    equation 5), and the cost linear in the number of tokens.

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
        query = split_heads(self.q(tokens[:, :1]), self.heads)
        if not absorbs(self, tokens):
            keys, values = split_heads(self.k(tokens), self.heads), split_heads(self.v(tokens), self.heads)
            attended = self.attend(query, keys, values)
        else:
            attended = attend_by_one(query, tokens, self.k, self.v, self.attend.attn_drop)
        return self.proj_drop(self.proj(merge_heads(attended)))
