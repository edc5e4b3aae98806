"""The plain CNN that the fusion models and their CNN parent share.

Dense 3×3 convolutions, BatchNorm and ReLU: a CPU does more of such multiply-adds per second than of any others.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from torch import Tensor, nn

from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import grid_of
from tokenfusion.models.backbones import CNNBackbone


class ConvNorm(nn.Sequential):
    """A 3×3 convolution without bias, max-pooling by `stride`, BatchNorm and ReLU.

    Pooling behind the convolution instead of a stride in it: the map is seen at full resolution before it shrinks.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.norm = nn.BatchNorm2d(out_chans)
        self.act = nn.ReLU()


class Residual(nn.Module):
    """A convolution beside the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, dim)

    def forward(self, feature_map: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        return feature_map + self.conv(feature_map)


class ConvTrunk(CNNBackbone):
    """A stem and stages: each halves the map with a convolution and max-pooling, then goes through residual ones.

    Args:
        in_chans: channels of the images.
        stem: width of the stem.
        strides: of the stem and of each stage.
        dims: width of each stage.
        depths: residual convolutions in each stage.
    """

    def __init__(
        self, in_chans: int, stem: int, strides: Sequence[int], dims: Sequence[int], depths: Sequence[int]
    ) -> None:
        stages = (
            nn.Sequential(ConvNorm(before, dim, stride), *[Residual(dim) for _ in range(depth)])
            for before, dim, depth, stride in zip((stem, *dims[:-1]), dims, depths, strides[1:], strict=True)
        )
        super().__init__(ConvNorm(in_chans, stem, strides[0]), stages, dims, tuple(accumulate(strides, mul))[1:])

    def layers(self) -> list[str]:
        rows = [(i, j) for i, stage in enumerate(self.stages) for j in range(len(stage))]  # type: ignore[arg-type]
        return [r"stem\.", *(rf"stages\.{i}\.{j}\." for i, j in rows)]

    def find_grids(self, img_size: Grid, in_chans: int) -> list[Grid]:  # noqa: ARG002
        return [grid_of(img_size, reduction) for reduction in self.reductions]
