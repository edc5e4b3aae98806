"""Every image decoded once: what it is, why it cannot be read, and a thumbnail to compare it by."""

import hashlib
import re
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decode import (
    UnreadableImage,
    decode_ahead,
    decode_image,
    decode_plain,
    has_deep_channels,
    is_plain,
)
from tokenfusion.data.decoded import checksum
from tokenfusion_runtime.decoding import decoding
from tokenfusion_runtime.image import FORMATS, ValueRange, is_deep

SIDE = 48
"""Height and width of the thumbnails that images are compared by; their aspect is not kept."""
ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
"""Formats whose further frames are pictures of their own; those of a phone's JPEG are previews and depth maps."""
UNREADABLE = {
    "empty": "is empty",
    "not an image": "^not an image",
    "too large": "max_pixels",
    "truncated": "(?i)truncat|unexpected end|premature end|ends inside",
}
"""Kinds of unreadable images and what the reason says; every other one is damaged."""
NO_THUMBNAIL = torch.empty(0)


@dataclass(frozen=True, eq=False)
class Inspection:
    """What one image is."""

    reason: str = ""
    """Why it cannot be read; empty where it can."""
    height: int = 0
    width: int = 0
    frames: str = ""
    """What lies behind the first frame, which alone is used; empty where nothing does."""
    colour: str = ""
    """What is unusual about its colours, such as CMYK; empty where nothing is."""
    digest: bytes = b""
    """A hash of size and decoded pixels: equal for exact duplicates only."""
    thumbnail: Tensor = NO_THUMBNAIL
    """uint8 (3, SIDE, SIDE)."""
    damage: str = ""
    """What libjpeg says of damaged data that it decodes all the same; empty where it says nothing."""
    checksum: int = 0
    """Of the decoded pixels, by which training knows an image again."""

    @property
    def kind(self) -> str:
        """Which kind of unreadable it is."""
        return next((kind for kind, words in UNREADABLE.items() if re.search(words, self.reason)), "damaged")


def inspect_images(
    dataset: Dataset, max_pixels: int, compared: Container[int], progress: Callable[[int, int], None]
) -> list[Inspection]:
    """Inspect every image of a dataset.

    Args:
        dataset: the images.
        max_pixels: largest height × width that is decoded.
        compared: indices of the images whose thumbnails are kept.
        progress: called with (images done, images in all).

    Returns:
        an Inspection per image, in order.
    """
    dataset.reader.require_there()
    inspections: list[Inspection] = []
    count, damaged = len(dataset), dict[int, str]()
    images = decode_ahead(
        range(count),
        lambda index: inspect_image(dataset, index, max_pixels, index in compared),
        on_damage=damaged.__setitem__,
    )
    for index, found in images:
        if isinstance(found, UnreadableImage):
            inspections.append(Inspection(reason=str(found)))
        else:
            inspections.append(replace(found, damage=damaged.get(index, "")))
        progress(len(inspections), count)
    return inspections


def inspect_image(dataset: Dataset, index: int, max_pixels: int, compared: bool) -> Inspection:
    """Decode one image, with a thumbnail if it will be compared.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    frames, colour = "", ""
    data = dataset.read(index)
    if isinstance(data, bytes):
        image = decode_image(data, max_pixels=max_pixels, value_range=dataset.value_range)
        with decoding(), Image.open(BytesIO(data), formats=FORMATS) as file:
            colour, frames = odd_colour(file, data) + beyond(file, dataset.value_range), further_frames(file)
            if file.format == "JPEG" and not is_plain(file):
                decode_plain(data)  # for what libjpeg says of it; Pillow, which has decoded it, keeps that to itself
    else:
        image = dataset.decode(index, max_pixels)
    height, width = image.shape[1:]
    digest = hashlib.blake2b(repr((height, width)).encode(), digest_size=16)
    digest.update(image.permute(1, 2, 0).contiguous().numpy().data)
    thumbnail = F.resize(image, [SIDE, SIDE], antialias=True) if compared else NO_THUMBNAIL
    return Inspection("", height, width, frames, colour, digest.digest(), thumbnail, checksum=checksum(image))


def further_frames(image: Image.Image) -> str:
    """What lies behind the first frame of a readable image; to count frames, Pillow goes to the last one."""
    if image.format not in ANIMATIONS:
        return ""
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them trip over
        return f"damaged behind the first frame, which is used ({str(error) or type(error).__name__})"
    return f"{frames} frames, of which the first is used" if frames > 1 else ""


def odd_colour(image: Image.Image, data: bytes) -> str:
    """What a classifier does not see as it is stored: other colour spaces, more than 8 bits, transparency."""
    if image.mode in ("CMYK", "LAB", "HSV", "YCbCr"):
        return image.mode
    if is_deep(image):
        return {"F": "floats", "I": "integers"}.get(image.mode, "16 bits")
    if has_deep_channels(image, data):
        return "16 bits"
    if image.has_transparency_data:
        return "palette with transparency" if image.mode == "P" else "transparency"
    return ""


def beyond(image: Image.Image, value_range: ValueRange | None) -> str:
    """What of a deep image's values lies outside the value range and is cut off, or is no number; "" where none is."""
    if value_range is None or not is_deep(image):
        return ""
    low, high = value_range
    values = np.asarray(image)
    finite = values[np.isfinite(values)]
    share, broken = float(((finite < low) | (finite > high)).mean()), values.size - finite.size
    said = f", {share:.2%} of its values ({finite.min():.9g} to {finite.max():.9g}) outside {low:.9g} to {high:.9g}"
    return said * (share > 0) + f", {broken:,} values that are no finite numbers" * (broken > 0)
