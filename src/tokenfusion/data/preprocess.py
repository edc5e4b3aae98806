"""From an image of any size to one as a model wants it: size, channels, and the scale of its values."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from tokenfusion.data.decode import ValueRange
from tokenfusion.errors import InputError
from tokenfusion.recipe_fields import require_value_range

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images. Travels with the weights."""

    img_size: tuple[int, int]
    """Height and width."""
    in_chans: int
    """1 for gray, 3 for RGB."""
    mean: tuple[float, ...]
    """Of each channel, for values in [0, 1]."""
    std: tuple[float, ...]
    crop_pct: float = 1.0
    """Share of the resized image's sides that the centre crop keeps."""
    interpolation: Interpolation = "bilinear"
    """How images are resized, antialiased either way."""
    value_range: ValueRange | None = None
    """What is black and white in images of more than 8 bits; None where no training image had more."""

    def __post_init__(self) -> None:
        if self.in_chans not in (1, 3):
            raise InputError(f"in_chans={self.in_chans}: images have 1 channel (gray) or 3 (RGB); choose one of them")
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise InputError(f"mean={self.mean}, std={self.std}: give one value for each of in_chans={self.in_chans}")
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise InputError(f"mean={self.mean}, std={self.std}: give finite values, and a std above 0")
        whole = all(type(side) is int for side in self.img_size)
        if not whole or len(self.img_size) != 2 or min(self.img_size) < 1 or not 0 < self.crop_pct <= 1:
            raise InputError(f"img_size={self.img_size}, crop_pct={self.crop_pct}: give height and width, and 0 to 1")
        if self.interpolation not in get_args(Interpolation):
            raise InputError(f"interpolation={self.interpolation!r} is not known; give bilinear or bicubic")
        if self.value_range is not None:
            require_value_range(self.value_range)

    def resize(self, image: Tensor) -> Tensor:
        """Resize so that the image covers `img_size / crop_pct`, keeping its aspect, and crop the centre.

        Args:
            image: uint8 (3, H, W).

        Returns:
            uint8 (in_chans, *img_size).
        """
        image = cover(image, self.img_size, self.crop_pct, self.interpolation)
        return F.rgb_to_grayscale(image) if self.in_chans == 1 else image

    def normalize(self, batch: Tensor) -> Tensor:
        """Scale to what the model was trained on: `(batch / 255 - mean) / std`.

        Args:
            batch: uint8 (B, in_chans, h, w), on any device.

        Returns:
            float32, same shape, device and memory format.
        """
        mean, std = (torch.tensor(values, device=batch.device) * 255 for values in (self.mean, self.std))
        pixels = batch.to(torch.float32, copy=True)
        if pixels.is_contiguous(memory_format=torch.channels_last):  # long rows are faster than three values each
            size, _, height, width = batch.shape
            rows = pixels.permute(0, 2, 3, 1).view(size, height, -1)
            rows.sub_(mean.repeat(width)).div_(std.repeat(width))
        else:
            pixels.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
        return pixels

    def to_dict(self) -> dict[str, Any]:
        """Its fields as JSON has them; the value range only where there is one."""
        fields = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocess":
        """The inverse of `to_dict`.

        Raises:
            InputError: a field is missing, unknown or out of range.
        """
        try:
            fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
            return cls(**fields)
        except TypeError as error:
            raise InputError(
                f"preprocessing {values}: {error}; use the version that wrote it, or a newer one"
            ) from error


def cover(
    image: Tensor, img_size: tuple[int, int], crop_pct: float = 1.0, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Resize (C, H, W), antialiased, so that it covers `img_size / crop_pct`, and crop the centre.

    Bicubic resizing is what pretrained weights ask for, and takes timm's sizes: both sides rounded down.
    """
    size = image.shape[-2:]
    if size == img_size and crop_pct == 1:
        return image
    targets = [side / crop_pct for side in img_size]
    if interpolation == "bicubic":
        targets = [math.floor(side) for side in targets]
    scale = max(side / now for side, now in zip(targets, size, strict=True))
    # A long thin image would grow huge: first drop, far from the crop's edge, what it drops anyway.
    needed = [2 * math.ceil(side / scale) for side in img_size]
    kept = [min(now, side + (now - side) % 2) for side, now in zip(needed, size, strict=True)]  # as much on either side
    image = F.center_crop(image, kept)
    whole = math.floor if interpolation == "bicubic" else round
    enlarged = [max(side, whole(now * scale + 1e-9)) for side, now in zip(img_size, image.shape[-2:], strict=True)]
    return F.center_crop(F.resize(image, enlarged, InterpolationMode(interpolation), antialias=True), list(img_size))
