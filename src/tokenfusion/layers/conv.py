"""The plain residual CNN that the fusion models and their CNN parent share.

Dense 3×3 convolutions, BatchNorm and ReLU: a CPU does more of such multiply-adds per second than of any others.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from torch import Tensor, nn


class ConvNorm(nn.Sequential):
    """A bias-free convolution, padded to keep ceil(size / stride), and BatchNorm."""

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_chans)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut (He et al., arXiv 1512.03385, figure 5 left)."""

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, out_chans, stride=stride)
        self.conv2 = ConvNorm(out_chans, out_chans)
        same = stride == 1 and in_chans == out_chans
        self.shortcut = nn.Identity() if same else ConvNorm(in_chans, out_chans, 1, stride)
        self.act = nn.ReLU()

    def forward(self, feature_map: Tensor) -> Tensor:
        update = self.conv2(self.act(self.conv1(feature_map)))
        return self.act(self.shortcut(feature_map) + update)


class ConvTrunk(nn.Module):
    """A stem and stages of residual blocks; the first block of a stage strides.

    Args:
        in_chans: channels of the images.
        stem: width of the stem.
        strides: of the stem and of each stage.
        dims: width of each stage.
        depths: residual blocks in each stage.
    """

    def __init__(
        self, in_chans: int, stem: int, strides: Sequence[int], dims: Sequence[int], depths: Sequence[int]
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(in_chans, stem, stride=strides[0]), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.Sequential(ResidualBlock(before, dim, stride), *[ResidualBlock(dim, dim) for _ in range(depth - 1)])
            for before, dim, depth, stride in zip((stem, *dims[:-1]), dims, depths, strides[1:], strict=True)
        )
        self.dims = tuple(dims)
        self.reductions = tuple(accumulate(strides, mul))[1:]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last stage's map (B, dims[-1], h, w)."""
        feature_map = self.stem(images)
        for stage in self.stages:
            feature_map = stage(feature_map)
        return feature_map
