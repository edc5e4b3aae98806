"""A training image at random: cropped, flipped, changed in colour or geometry, erased in part."""

import math

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from tokenfusion.data.changes import jitter_colors, rand_augment, trivial_augment
from tokenfusion.data.preprocess import cover
from tokenfusion.errors import InputError
from tokenfusion.recipe import Recipe


class Augment:
    """A training image at random: crop, flip, colour or geometric changes; drawn from torch's default generator.

    What torchvision's RandomResizedCrop, RandomCrop, RandomHorizontalFlip and TrivialAugmentWide do one after another,
    in half the time: its modules first find out what they were given, and draw numbers one by one.

    Args:
        img_size: height and width of the result.
        in_chans: 1 for gray, 3 for RGB.
        crop_scale: smallest share of the image's area that a crop keeps; its aspect is 3/4 to 4/3. 1 for no crop.
        hflip: probability of a horizontal flip.
        trivial_augment: whether to apply TrivialAugment (Wide), https://arxiv.org/abs/2103.10158.
        crop_padding: pixels by which the result is shifted at most, up or down and sideways; the edge is mirrored.
        rand_augment: RandAugment's magnitude, 0 for none.
        color_jitter: how far brightness, contrast and saturation are changed, 0 for none.
        random_erasing: probability that a rectangle is erased.

    Raises:
        InputError: a padding that is no smaller than the result.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        in_chans: int,
        crop_scale: float,
        hflip: float,
        trivial_augment: bool,
        crop_padding: int = 0,
        *,
        rand_augment: float = 0.0,
        color_jitter: float = 0.0,
        random_erasing: float = 0.0,
    ) -> None:
        if crop_padding >= min(img_size):
            raise InputError(
                f"crop_padding={crop_padding} mirrors more than there is of images of {img_size[0]}×{img_size[1]} "
                f"pixels; give {min(img_size) // 8} or so, {min(img_size) - 1} at most"
            )
        self.img_size = img_size
        self.in_chans = in_chans
        self.crop_scale = crop_scale
        self.hflip = hflip
        self.trivial_augment = trivial_augment
        self.crop_padding = crop_padding
        self.rand_augment = rand_augment
        self.color_jitter = color_jitter
        self.random_erasing = random_erasing

    @classmethod
    def from_recipe(cls, recipe: Recipe, img_size: tuple[int, int]) -> "Augment":
        """What a recipe says, of images resized to (height, width)."""
        return cls(
            img_size,
            recipe.in_chans,
            recipe.crop_scale,
            recipe.hflip,
            recipe.trivial_augment,
            recipe.crop_padding,
            rand_augment=recipe.rand_augment,
            color_jitter=recipe.color_jitter,
            random_erasing=recipe.random_erasing,
        )

    def __call__(self, image: Tensor) -> Tensor:
        """Augment one image.

        Args:
            image: uint8 (3, H, W).

        Returns:
            uint8 (in_chans, *img_size).
        """
        if self.crop_scale < 1:
            image = resized_crop(image, random_box(image.shape[-2], image.shape[-1], self.crop_scale), self.img_size)
        else:
            image = cover(image, self.img_size)
        if self.crop_padding:
            image = shifted_crop(image, self.crop_padding)
        if torch.rand(1).item() < self.hflip:
            image = image.flip(-1)
        if self.trivial_augment:
            image = trivial_augment(image)
        if self.rand_augment:
            image = rand_augment(image, self.rand_augment)
        if self.color_jitter:
            image = jitter_colors(image, self.color_jitter)
        if self.random_erasing and torch.rand(1).item() < self.random_erasing:
            image = erased(image)
        return F.rgb_to_grayscale(image) if self.in_chans == 1 else image


Box = tuple[int, int, int, int]
"""Top, left, height and width, in pixels."""

MAX_ASPECT = 4 / 3


def random_box(height: int, width: int, crop_scale: float) -> Box:
    """Where to crop an image: area uniform, aspect log-uniform, place uniform; as RandomResizedCrop draws it."""
    for _ in range(10):
        area, aspect, down, right = torch.rand(4).tolist()
        area = height * width * (crop_scale + (1 - crop_scale) * area)
        aspect = MAX_ASPECT ** (2 * aspect - 1)
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    h, w = min(height, round(width * MAX_ASPECT)), min(width, round(height * MAX_ASPECT))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: Tensor, box: Box, img_size: tuple[int, int]) -> Tensor:
    """Crop (3, H, W) and resize to (3, *img_size), bilinear and antialiased."""
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    if (height, width) == img_size:
        return crop[0]
    crop = crop.contiguous(memory_format=torch.channels_last)  # a small copy, by which resizing takes half the time
    return interpolate(crop, img_size, mode="bilinear", antialias=True)[0]


def shifted_crop(image: Tensor, padding: int) -> Tensor:
    """(3, H, W) moved by up to `padding` pixels each way, mirrored at its edges, as RandomCrop draws it."""
    height, width = image.shape[-2:]
    top, left = torch.randint(2 * padding + 1, (2,)).tolist()
    return F.pad(image, [padding], padding_mode="reflect")[:, top : top + height, left : left + width]


ERASED_AREA = 0.02, 1 / 3
ERASED_ASPECT = 0.3, 1 / 0.3
MEAN, STD = (255 * torch.tensor(numbers)[:, None, None] for numbers in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))


def erased(image: Tensor) -> Tensor:
    """(3, H, W) with noise in a rectangle (Zhong et al., arXiv 1708.04896).

    Its area, aspect and place are drawn as timm draws them, and so is the noise, normal once normalised by ImageNet's
    mean and std; here it is in whole grey levels, those beyond black and white cut off.
    """
    height, width = image.shape[-2:]
    for _ in range(10):
        area, aspect, down, right = torch.rand(4).tolist()
        area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area)
        aspect = ERASED_ASPECT[0] * (ERASED_ASPECT[1] / ERASED_ASPECT[0]) ** aspect
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
            noise = (MEAN + STD * torch.randn(3, h, w)).round().clamp(0, 255).to(image.dtype)
            image = image.clone()
            image[:, top : top + h, left : left + w] = noise
            return image
    return image
