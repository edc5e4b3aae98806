"""A training image at random: cropped, flipped, changed in colour or geometry."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from tokenfusion.data.preprocess import cover
from tokenfusion.errors import InputError
from tokenfusion.recipe import Recipe


class Augment:
    """A training image at random: crop, flip, one colour or geometric change; drawn from torch's default generator.

    What torchvision's RandomResizedCrop, RandomCrop, RandomHorizontalFlip and TrivialAugmentWide do one after another,
    in half the time: its modules first find out what they were given, and draw numbers one by one.

    Args:
        img_size: height and width of the result.
        in_chans: 1 for gray, 3 for RGB.
        crop_scale: smallest share of the image's area that a crop keeps; its aspect is 3/4 to 4/3. 1 for no crop.
        hflip: probability of a horizontal flip.
        trivial_augment: whether to apply TrivialAugment (Wide), https://arxiv.org/abs/2103.10158.
        crop_padding: pixels by which the result is shifted at most, up or down and sideways; the edge is mirrored.

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

    @classmethod
    def from_recipe(cls, recipe: Recipe, img_size: tuple[int, int]) -> "Augment":
        """What a recipe says, of images resized to (height, width)."""
        return cls(
            img_size, recipe.in_chans, recipe.crop_scale, recipe.hflip, recipe.trivial_augment, recipe.crop_padding
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


def shear_x(image: Tensor, slope: float) -> Tensor:
    shear = [math.degrees(math.atan(slope)), 0.0]
    return F.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0.0, 0.0])


def shear_y(image: Tensor, slope: float) -> Tensor:
    shear = [0.0, math.degrees(math.atan(slope))]
    return F.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0.0, 0.0])


def translate_x(image: Tensor, pixels: float) -> Tensor:
    return F.affine(image, angle=0.0, translate=[int(pixels), 0], scale=1.0, shear=[0.0, 0.0])


def translate_y(image: Tensor, pixels: float) -> Tensor:
    return F.affine(image, angle=0.0, translate=[0, int(pixels)], scale=1.0, shear=[0.0, 0.0])


@dataclass(frozen=True)
class Change:
    """One of TrivialAugment's changes, with its magnitudes from none to most."""

    apply: Callable[[Tensor, float], Tensor]
    magnitudes: tuple[float, ...] = ()
    signed: bool = False
    """Whether a magnitude may also be negative."""


BINS = 31


def up_to(most: float) -> tuple[float, ...]:
    return tuple(torch.linspace(0.0, most, BINS).tolist())


# The paper's wide space, in torchvision's order, so that the same draws give the same images.
CHANGES = (
    Change(lambda image, _: image),
    Change(shear_x, up_to(0.99), signed=True),
    Change(shear_y, up_to(0.99), signed=True),
    Change(translate_x, up_to(32.0), signed=True),
    Change(translate_y, up_to(32.0), signed=True),
    Change(lambda image, degrees: F.rotate(image, degrees), up_to(135.0), signed=True),
    Change(lambda image, m: F.adjust_brightness(image, 1.0 + m), up_to(0.99), signed=True),
    Change(lambda image, m: F.adjust_saturation(image, 1.0 + m), up_to(0.99), signed=True),
    Change(lambda image, m: F.adjust_contrast(image, 1.0 + m), up_to(0.99), signed=True),
    Change(lambda image, m: F.adjust_sharpness(image, 1.0 + m), up_to(0.99), signed=True),
    Change(lambda image, bits: F.posterize(image, int(bits)), tuple(8.0 - round(k / 5) for k in range(BINS))),
    Change(lambda image, m: F.solarize(image, 255.0 * m), tuple(torch.linspace(1.0, 0.0, BINS).tolist())),
    Change(lambda image, _: F.autocontrast(image)),
    Change(lambda image, _: F.equalize(image)),
)


def trivial_augment(image: Tensor) -> Tensor:
    """One change of one strength, both drawn uniformly."""
    change = CHANGES[int(torch.randint(len(CHANGES), ()))]
    if not change.magnitudes:
        return change.apply(image, 0.0)
    magnitude = change.magnitudes[int(torch.randint(BINS, ()))]
    if change.signed and torch.rand(()).item() <= 0.5:
        magnitude = -magnitude
    return change.apply(image, magnitude)
