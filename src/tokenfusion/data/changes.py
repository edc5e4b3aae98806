"""Changes of an image's colour and geometry at random: TrivialAugment, RandAugment and colour jitter."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F


def moved(
    image: Tensor,
    *,
    right: float = 0.0,
    down: float = 0.0,
    shear_x: float = 0.0,
    shear_y: float = 0.0,
    **drawn: Any,
) -> Tensor:
    """(3, H, W) shifted by whole pixels, and sheared by slopes from the upper left corner.

    Args:
        image: uint8 (3, H, W).
        right, down: pixels.
        shear_x, shear_y: slopes.
        **drawn: torchvision's `interpolation` and `fill`.
    """
    shear = [math.degrees(math.atan(slope)) for slope in (shear_x, shear_y)]
    center = [0.0, 0.0] if shear_x or shear_y else None
    return F.affine(image, angle=0.0, translate=[int(right), int(down)], scale=1.0, shear=shear, center=center, **drawn)


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


# --- RandAugment (Cubuk et al., arXiv 1909.13719) as timm's `rand-m9-mstd0.5-inc1` has it, which the papers' recipes
# name. timm's own changes Pillow's images, and fails under Pillow 13.

LAYERS, APPLIED, SPREAD, MOST = 2, 0.5, 0.5, 10.0
"""Changes of an image, the probability of each, the standard deviation of its magnitude, and the largest one."""
DRAWN: dict[str, Any] = {
    "interpolation": InterpolationMode.BILINEAR,  # timm takes bicubic for half of them, which tensors do not have here
    "fill": [round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN],
}


def posterized(image: Tensor, share: float) -> Tensor:
    bits = 4 - int(4 * share)
    return F.posterize(image, bits) if bits else torch.zeros_like(image)


def solarized(image: Tensor, share: float) -> Tensor:
    threshold = 256 - int(256 * share)
    return F.solarize(image, threshold) if threshold < 256 else image


def solarized_by_adding(image: Tensor, share: float) -> Tensor:
    """Dark values, below 128, brighter by up to 110."""
    return torch.where(image < 128, image + int(110 * share), image)  # 127 + 110 is below 256


def factor(share: float) -> float:
    """By what brightness and its like are multiplied; 1 changes nothing."""
    return max(0.1, 1 + 0.9 * share)


RAND_CHANGES: dict[str, tuple[Callable[[Tensor, float], Tensor], bool]] = {
    "AutoContrast": (lambda image, _: F.autocontrast(image), False),
    "Equalize": (lambda image, _: F.equalize(image), False),
    "Invert": (lambda image, _: F.invert(image), False),
    "Rotate": (lambda image, share: F.rotate(image, 30 * share, **DRAWN), True),
    "PosterizeIncreasing": (posterized, False),
    "SolarizeIncreasing": (solarized, False),
    "SolarizeAdd": (solarized_by_adding, False),
    "ColorIncreasing": (lambda image, share: F.adjust_saturation(image, factor(share)), True),
    "ContrastIncreasing": (lambda image, share: F.adjust_contrast(image, factor(share)), True),
    "BrightnessIncreasing": (lambda image, share: F.adjust_brightness(image, factor(share)), True),
    "SharpnessIncreasing": (lambda image, share: F.adjust_sharpness(image, factor(share)), True),
    "ShearX": (lambda image, share: moved(image, shear_x=0.3 * share, **DRAWN), True),
    "ShearY": (lambda image, share: moved(image, shear_y=0.3 * share, **DRAWN), True),
    "TranslateXRel": (lambda image, share: moved(image, right=0.45 * share * image.shape[2], **DRAWN), True),
    "TranslateYRel": (lambda image, share: moved(image, down=0.45 * share * image.shape[1], **DRAWN), True),
}
"""By timm's name: the change of an image by a share of the most, and whether the share may also be negative."""


def rand_augment(image: Tensor, magnitude: float) -> Tensor:
    """Two changes at random, each made or not made, of about this magnitude out of 10."""
    changes = list(RAND_CHANGES.values())
    for number in torch.randint(len(changes), (LAYERS,)).tolist():
        made, noise, sign = torch.rand(()).item() < APPLIED, torch.randn(()).item(), torch.rand(()).item()
        if made:
            change, signed = changes[number]
            share = min(max(magnitude + SPREAD * noise, 0.0), MOST) / MOST
            image = change(image, -share if signed and sign < 0.5 else share)
    return image


def jitter_colors(image: Tensor, most: float) -> Tensor:
    """Brightness, contrast and saturation in random order, each times 1 - most to 1 + most."""
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for number in torch.randperm(len(changes)).tolist():
        image = changes[number](image, 1 + most * (2 * torch.rand(()).item() - 1))
    return image
