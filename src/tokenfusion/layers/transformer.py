"""The pre-norm transformer block (ViT, arXiv 2010.11929, equations 2 and 3)."""

from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from tokenfusion.layers.attention import Attention


class Block(nn.Module):
    """Self-attention, then an MLP, each behind a LayerNorm and beside an identity.

    Args:
        dim: width of the tokens.
        num_heads: heads of the attention.
        mlp_ratio: the MLP's hidden width as a multiple of `dim`.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, dim) to (B, N, dim)."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))
