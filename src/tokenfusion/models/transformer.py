"""The plain vision transformer (Dosovitskiy et al., arXiv 2010.11929): what other papers start from, and alone."""

from torch import Tensor, nn

from tokenfusion.layers.attend import SelfAttention, check_heads
from tokenfusion.layers.blocks import (
    Block,
    PaddedConv,
    TokenEmbedding,
    init_linear_and_norm,
    layer_norm,
    rising_rates,
)
from tokenfusion.layers.intermediates import FeaturePoint
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, TokenLayout, grid_of
from tokenfusion.models.backbones import TokenBackbone
from tokenfusion.models.base import at_least, image_size, linear_head


class PlainTransformer(TokenBackbone):
    """[CLS; patch tokens] through a row of blocks; the head reads CLS. A paper's model sets the attributes.

    Letters: B batch, C channels, h w grid of patches.
    """

    embed_dim: int
    patch_size: int
    embed: TokenEmbedding
    blocks: nn.ModuleList
    norm: nn.Module
    head_drop: nn.Dropout

    def finish(self, tokens: Tensor, context: Grid) -> Tensor:  # noqa: ARG002
        """Tokens to normed tokens (B, 1 + h·w, C), CLS first."""
        return self.norm(tokens)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed tokens (B, 1 + h·w, C) to logits (B, num_classes), or to the CLS token (B, C)."""
        cls = self.head_drop(features[:, 0])
        return cls if pre_logits else self.head(cls)

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self.embed_dim

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.blocks[0].attn.heads  # type: ignore[return-value,union-attr]

    @property
    def reduction(self) -> int:  # type: ignore[override]
        return self.patch_size

    def build_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.embed_dim, num_classes)

    def feature_points(self) -> list[FeaturePoint]:
        """The patch tokens after each block."""
        return [
            FeaturePoint(f"blocks.{i}", self.embed_dim, self.patch_size, prefix_tokens=1, norm="norm")
            for i in range(len(self.blocks))
        ]

    def token_layout(self, img_size: Grid | None = None) -> TokenLayout:
        return TokenGroup("cls"), TokenGroup("patch", grid_of(img_size or self.img_size, self.patch_size))

    def attention_layouts(self, img_size: Grid | None = None) -> dict[str, AttentionLayout]:
        layout = AttentionLayout.among(self.token_layout(img_size))
        return {f"blocks.{i}.attn": layout for i in range(len(self.blocks))}

    def layers(self) -> list[str]:
        return [r"embed\.", *(rf"blocks\.{i}\." for i in range(len(self.blocks)))]

    def no_weight_decay(self) -> set[str]:
        return {"embed.cls_token", "embed.positions.table"}


class ViT(PlainTransformer):
    """The transformer alone.

    Args:
        img_size: height and width the position table is learned on, in pixels; forward takes any other too.
        in_chans: channels of an image.
        num_classes: outputs; 0 for none.
        patch_size: side of a patch in pixels.
        dim, depth, heads, mlp_ratio: width, blocks, heads and MLP expansion.
        drop_rate: dropout before the head.
        drop_path_rate: rate of stochastic depth at the last block.

    Raises:
        InputError: heads that do not divide the width, an impossible size.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, depth=depth, patch_size=patch_size, in_chans=in_chans)
        check_heads(dim, heads)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.img_size, self.patch_size = image_size(img_size), patch_size
        patches = PaddedConv(in_chans, dim, patch_size, stride=patch_size)
        self.embed = TokenEmbedding(patches, dim, grid_of(self.img_size, patch_size))
        self.blocks = nn.ModuleList(
            Block(dim, SelfAttention(dim, heads), mlp_ratio, path=path) for path in rising_rates(drop_path_rate, depth)
        )
        self.norm = layer_norm(dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(init_linear_and_norm)
        self.head = self.build_head(num_classes)
