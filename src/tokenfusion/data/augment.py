"""A training image at random: cropped, flipped, changed in colour or geometry."""

import math
from collections.abc import Callable, Sequence

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


def moved(
    image: Tensor, *, right: float = 0.0, down: float = 0.0, shear_x: float = 0.0, shear_y: float = 0.0
) -> Tensor:
    """(3, H, W) shifted by whole pixels, and sheared by slopes from the upper left corner."""
    shear = [math.degrees(math.atan(slope)) for slope in (shear_x, shear_y)]
    center = [0.0, 0.0] if shear_x or shear_y else None
    return F.affine(image, angle=0.0, translate=[int(right), int(down)], scale=1.0, shear=shear, center=center)


Change = tuple[Callable[[Tensor, float], Tensor], Sequence[float], bool]
"""One of TrivialAugment's changes, its magnitudes from none to most, and whether one may also be negative."""

BINS = 31


def up_to(most: float) -> list[float]:
    return torch.linspace(0.0, most, BINS).tolist()


# The paper's wide space, in torchvision's order, so that the same draws give the same images.
CHANGES: tuple[Change, ...] = (
    (lambda image, _: image, (), False),
    (lambda image, slope: moved(image, shear_x=slope), up_to(0.99), True),
    (lambda image, slope: moved(image, shear_y=slope), up_to(0.99), True),
    (lambda image, pixels: moved(image, right=pixels), up_to(32.0), True),
    (lambda image, pixels: moved(image, down=pixels), up_to(32.0), True),
    (lambda image, degrees: F.rotate(image, degrees), up_to(135.0), True),
    (lambda image, m: F.adjust_brightness(image, 1.0 + m), up_to(0.99), True),
    (lambda image, m: F.adjust_saturation(image, 1.0 + m), up_to(0.99), True),
    (lambda image, m: F.adjust_contrast(image, 1.0 + m), up_to(0.99), True),
    (lambda image, m: F.adjust_sharpness(image, 1.0 + m), up_to(0.99), True),
    (lambda image, bits: F.posterize(image, int(bits)), [8.0 - round(k / 5) for k in range(BINS)], False),
    (lambda image, m: F.solarize(image, 255.0 * m), torch.linspace(1.0, 0.0, BINS).tolist(), False),
    (lambda image, _: F.autocontrast(image), (), False),
    (lambda image, _: F.equalize(image), (), False),
)


def trivial_augment(image: Tensor) -> Tensor:
    """One change of one strength, both drawn uniformly."""
    apply, magnitudes, signed = CHANGES[int(torch.randint(len(CHANGES), ()))]
    if not magnitudes:
        return apply(image, 0.0)
    magnitude = magnitudes[int(torch.randint(BINS, ()))]
    if signed and torch.rand(()).item() <= 0.5:
        magnitude = -magnitude
    return apply(image, magnitude)
