"""The plain parents that a fusion of CNN and transformer is measured against, at equal cost.

ViT (Dosovitskiy et al., arXiv 2010.11929): patches, each through one linear map, and pre-norm blocks of self-attention.
ResNet (after He et al., arXiv 1512.03385): convolutions with shortcuts and the average of the last map; it pools where
the paper's strides. Both are made of the parts that the fusion models of this package share, so that a comparison tells
of the fusion alone. Letters: B batch, C channels, h w grid.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tokenfusion.layers.blocks import drop_path, rising_rates
from tokenfusion.layers.intermediates import FeaturePoint
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, TokenLayout, grid_of
from tokenfusion.models.base import PaperModel, at_least, image_size, linear_head
from tokenfusion.models.convnet import ConvTrunk, Residual
from tokenfusion.models.registration import register_variants
from tokenfusion.models.transformer import ViT


class ResNet(PaperModel):
    """The CNN alone.

    Args:
        img_size: height and width in pixels that `token_layout` is of; forward takes any other too.
        in_chans: channels of an image.
        num_classes: outputs; 0 for none.
        stem, strides, dims, depths: the CNN, as in `ConvTrunk`.
        drop_rate: dropout before the head.
        drop_path_rate: rate of stochastic depth at the last block.

    Raises:
        InputError: an impossible size.
    """

    def __init__(
        self,
        *,
        stem: int,
        strides: Sequence[int],
        dims: Sequence[int],
        depths: Sequence[int],
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        at_least(1, in_chans=in_chans, stem=stem, strides=strides, dims=dims)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.img_size = image_size(img_size)
        self.cnn = ConvTrunk(in_chans, stem, strides, dims, depths)
        blocks = [module for module in self.cnn.modules() if isinstance(module, Residual)]
        for block, path in zip(blocks, rising_rates(drop_path_rate, len(blocks)), strict=True):
            block.conv.append(drop_path(path))  # a block's update ends there
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self.build_head(num_classes)

    def build_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.num_features, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last stage's map (B, C, h, w)."""
        return self.cnn(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The map (B, C, h, w) to logits (B, num_classes), or to its average (B, C)."""
        pooled = self.head_drop(features.mean(dim=(2, 3)))
        return pooled if pre_logits else self.head(pooled)

    def feature_points(self) -> list[FeaturePoint]:
        """The map after each stage."""
        shapes = zip(self.cnn.dims, self.cnn.reductions, strict=True)
        return [FeaturePoint(f"cnn.stages.{i}", dim, reduction) for i, (dim, reduction) in enumerate(shapes)]

    def layers(self) -> list[str]:
        return [rf"cnn\.{layer}" for layer in self.cnn.layers()]

    def token_layout(self, img_size: Grid | None = None) -> TokenLayout:
        return (TokenGroup("pixel", grid_of(img_size or self.img_size, self.cnn.reductions[-1])),)

    def attention_layouts(self, img_size: Grid | None = None) -> dict[str, AttentionLayout]:  # noqa: ARG002
        return {}


MICRO: dict[str, Any] = {"img_size": 32, "num_classes": 10}
TRANSFORMERS: dict[str, tuple[type[ViT], dict[str, Any]]] = {
    "vit_micro": (ViT, MICRO | {"patch_size": 4, "dim": 96, "depth": 6, "heads": 3, "mlp_ratio": 2.5}),
}
CNNS: dict[str, tuple[type[ResNet], dict[str, Any]]] = {
    "resnet_micro": (
        ResNet,
        MICRO | {"stem": 16, "strides": (1, 2, 2, 2), "dims": (48, 96, 128), "depths": (1, 1, 1)},
    ),
}
VARIANTS = TRANSFORMERS | CNNS
FIRST_CONV = {"cnn": "cnn.stem.conv", "vit": "embed.patches"}
VIT_CONFIG = {"first_conv": FIRST_CONV["vit"]}
CNN_CONFIG = {"first_conv": FIRST_CONV["cnn"], "pool_size": (4, 4)}
register_variants(__name__, TRANSFORMERS, configs=dict.fromkeys(TRANSFORMERS, VIT_CONFIG), out_indices=(-3, -2, -1))
register_variants(__name__, CNNS, configs=dict.fromkeys(CNNS, CNN_CONFIG), out_indices=(0, 1, 2))
