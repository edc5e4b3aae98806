"""The plain vision transformer (Dosovitskiy et al., arXiv 2010.11929) that other papers start from."""

from torch import Tensor, nn

from tokenfusion.layers.blocks import TokenEmbedding
from tokenfusion.layers.intermediates import FeaturePoint
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, TokenLayout, grid_of
from tokenfusion.models.base import PaperModel, linear_head


class PlainTransformer(PaperModel):
    """[CLS; patch tokens] through a row of blocks; the head reads CLS. A paper's model sets the attributes.

    Letters: B batch, C channels, h w grid of patches.
    """

    embed_dim: int
    patch_size: int
    embed: TokenEmbedding
    blocks: nn.ModuleList
    norm: nn.Module
    head_drop: nn.Dropout

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to normed tokens (B, 1 + h·w, C), CLS first."""
        tokens, _ = self.embed(images)
        for block in self.blocks:
            tokens = self.run(block, tokens)
        return self.norm(tokens)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed tokens (B, 1 + h·w, C) to logits (B, num_classes), or to the CLS token (B, C)."""
        cls = self.head_drop(features[:, 0])
        return cls if pre_logits else self.head(cls)

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

    def no_weight_decay(self) -> set[str]:
        return {"embed.cls_token", "embed.positions.table"}
