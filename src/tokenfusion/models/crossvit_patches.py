"""What CrossViT's branches see (Chen et al., arXiv 2103.14899): the image at a scale of their own, and its patches.

Letters: B batch, C channels, h w grid.
"""

from fractions import Fraction
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.layers.positions import Grid

CONV_STRIDES = {4: (1, 1), 8: (2, 1), 12: (3, 1), 16: (2, 2)}  # of the 3×3, by the patch; the paper has the last two


def linear_patches(in_chans: int, dim: int, patch_size: int) -> nn.Module:
    """Patches, each through one linear map (ViT)."""
    return nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)


class DaggerPatches(nn.Sequential):
    """The dagger's three convolutions: 7×7 stride 4, then two 3×3 that reach the stride of the patch."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        if patch_size not in CONV_STRIDES:
            sizes = ", ".join(map(str, CONV_STRIDES))
            raise InputError(f"patch_size={patch_size} is out of reach of the conv stem's strides; try one of {sizes}")
        middle, last = CONV_STRIDES[patch_size]
        super().__init__(
            nn.Conv2d(in_chans, dim // 4, 7, stride=4, padding=3),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim // 4, dim // 2, 3, middle, padding=int(middle < 3)),  # stride 3 leaves no gap to pad
            nn.ReLU(inplace=True),
            nn.Conv2d(dim // 2, dim, 3, last, padding=1),
        )


STEMS = {"linear": linear_patches, "conv": DaggerPatches}


class ImageScale(NamedTuple):
    """What a branch sees: the image at `numerator / denominator` of its size, rounded up to whole patches."""

    patch_size: int
    numerator: int = 1
    denominator: int = 1

    @property
    def reduction(self) -> Fraction:
        """Pixels of the image, as it was, per patch, along one side."""
        return Fraction(self.patch_size * self.denominator, self.numerator)

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of patches for an image of this size."""
        return self._patches(height), self._patches(width)

    def resize(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) as the branch sees them."""
        rows, columns = self.grid(images.shape[2], images.shape[3])
        size = (rows * self.patch_size, columns * self.patch_size)
        if size == (images.shape[2], images.shape[3]):
            return images
        return F.interpolate(images, size=size, mode="bicubic", align_corners=False)

    def _patches(self, side: int) -> int:
        return -(-side * self.numerator // (self.patch_size * self.denominator))
