"""One decoder for training and prediction: the bytes of an image file become the RGB that a person sees.

Plain JPEG goes through torchvision's decoder, which is the faster one, all else through Pillow. PNG and WebP too: a
single wrong byte in a PNG's data ends the process with a segmentation fault in torchvision 0.29.1. Pillow's part is in
`tokenfusion_runtime.image`, so that an exported classifier decodes by the same lines.
"""

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torchvision.io  # noqa: F401 - loads torch.ops.image
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tokenfusion_runtime.classifier import ImageLike, content_of
from tokenfusion_runtime.decoding import decoding, printed, printed_after, printed_by
from tokenfusion_runtime.errors import UnreadableImage
from tokenfusion_runtime.image import (
    EXTENSIONS,
    FORMATS,
    LFS_POINTER,
    ValueRange,
    is_deep,
    is_image,
    large_ones_alone,
    opened,
    orientation,
    pillow_image,
    refuse_large,
    refuse_missing_blocks,
    to_rgb,
    whole_rgb,
)

__all__ = ["EXTENSIONS", "LFS_POINTER", "UnreadableImage", "ValueRange", "is_image", "refuse_large", "to_rgb"]

THREADS = min(4, os.cpu_count() or 1)
"""Threads that decode at the same time."""
RGB = 3  # torchvision's ImageReadMode.RGB, as its operator takes it
DAMAGE = re.compile("Corrupt JPEG data: (?!bad ICC)|Premature end of JPEG|Inconsistent progression")
"""How what libjpeg prints of pixels begins; the rest is of headers."""


Item = TypeVar("Item")
Decoded = TypeVar("Decoded")


def decode_image(data: bytes, *, max_pixels: int, value_range: ValueRange | None = None) -> Tensor:
    """Decode an image file as a person sees it.

    EXIF orientation is applied, transparency lies on white, deeper values are scaled to 8 bits, gray becomes three
    equal channels, and of an animation the first frame is taken.

    Args:
        data: the file's bytes.
        max_pixels: largest height × width that is decoded; the header decides, before any pixel is.
        value_range: what becomes black and white of images of more than 8 bits; see `to_rgb`.

    Returns:
        uint8 tensor (3, H, W).

    Raises:
        UnreadableImage: the bytes are no image, a damaged one, or one that is too large.
    """
    with opened(data, max_pixels) as image:
        pixels = decode_plain(data) if is_plain(image) else None
        if pixels is None:
            return F.pil_to_tensor(whole_rgb(image, data, value_range))
        refuse_missing_blocks(data, pixels[:, -1, -1].tolist())
        return pixels


def decode_given(image: ImageLike, max_pixels: int, value_range: ValueRange | None = None) -> Tensor:
    """Any way to give an image, as uint8 (3, H, W); files go through `decode_image`, and so does what they hold.

    Raises:
        UnreadableImage: it is damaged or too large.
        InputError: it is none of these ways.
    """
    if isinstance(image, str | Path | bytes | BytesIO):
        return decode_image(content_of(image), max_pixels=max_pixels, value_range=value_range)
    pillow = pillow_image(image, max_pixels, value_range)
    try:
        return F.pil_to_tensor(to_rgb(pillow, value_range))
    except UnreadableImage:
        raise
    except (OSError, ValueError, SyntaxError) as error:  # its file is read only now
        raise UnreadableImage(f"damaged image: {error}") from error


def deep_values(data: bytes, *, max_pixels: int) -> np.ndarray | None:
    """The values (H, W) of a gray image of more than 8 bits as they are stored; None of any other image.

    Raises:
        UnreadableImage: it is damaged or too large.
    """
    try:  # the header tells, and most images are not looked at further
        with decoding(), Image.open(BytesIO(data), formats=FORMATS) as image:
            deep = is_deep(image)
    except Exception:  # as in `opened`, whose caller hears the reason
        return None
    if not deep:
        return None
    with opened(data, max_pixels) as image:
        return np.asarray(image)


def is_plain(image: Image.Image) -> bool:
    """Whether torchvision's decoder sees what a person does: a JPEG in gray or RGB that lies upright."""
    return image.format == "JPEG" and image.mode in ("L", "RGB") and orientation(image) == 1


def decode_plain(data: bytes) -> Tensor | None:
    """Decode by torchvision; None where it fails, so that Pillow tries too and gives the reason.

    The operator is called directly: from 0.29 on, its wrapper `torchvision.io.decode_image` warns on every call.
    """
    try:
        return torch.ops.image.decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), RGB, False)
    except (RuntimeError, AttributeError):
        return None


def deep_colour(data: bytes, *, max_pixels: int) -> int | None:
    """The greatest value, to 255, that is left of a colour image of 16 bits, of which Pillow gives the high bytes
    alone; None of any other image.

    Raises:
        UnreadableImage: it is damaged or too large.
    """
    try:
        with decoding(), Image.open(BytesIO(data), formats=FORMATS) as image:
            deep = has_deep_channels(image, data) and not is_deep(image)
    except Exception:  # as in `deep_values`
        return None
    return int(decode_image(data, max_pixels=max_pixels).max()) if deep else None


def has_deep_channels(image: Image.Image, data: bytes) -> bool:
    """Whether a file has more than 8 bits a channel: Pillow opens PNG and TIFF of 3 × 16 bits as RGB, and only the
    header still tells."""
    depths = getattr(image, "tag_v2", {}).get(258, ())
    return (image.format == "PNG" and data[24] == 16) or max(depths, default=8) > 8


def decode_ahead(
    items: Iterable[Item],
    decode: Callable[[Item], Decoded],
    waiting: int = 2 * THREADS,
    on_damage: Callable[[Item, str], object] | None = None,
) -> Iterator[tuple[Item, Decoded | UnreadableImage]]:
    """Decode by a few threads, in order, only so far ahead that few images wait in memory.

    Args:
        items: what to decode, taken one by one, so that they need not end.
        decode: called with each in one of the threads; what it gives is passed on, and so is an UnreadableImage that
            it raises.
        waiting: most images that are decoded, or being decoded, and not yet taken.
        on_damage: called with each item of which libjpeg says that its data is damaged, though it gives a picture, and
            with what it says, before the item is yielded.

    Yields:
        each item, with what it decoded to or the reason why it cannot be.
    """
    hearing = Hearing()

    def attempt(item: Item) -> tuple[Decoded | UnreadableImage, str]:
        def whole() -> Decoded:
            with large_ones_alone():
                return decode(item)

        try:
            return (whole(), "") if on_damage is None else hearing.hear(whole)
        except UnreadableImage as error:
            return error, ""

    def settle() -> tuple[Item, Decoded | UnreadableImage]:
        item, future = begun.popleft()
        found, damage = future.result()
        if damage and on_damage is not None:
            on_damage(item, damage)
        return item, found

    begun: deque[tuple[Item, Future[tuple[Decoded | UnreadableImage, str]]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for item in items:
                begun.append((item, pool.submit(attempt, item)))
                if len(begun) > waiting:
                    yield settle()
            while begun:
                yield settle()
        finally:
            pool.shutdown(cancel_futures=True)


class Hearing:
    """Hears what libjpeg says of each of the images that several threads decode at the same time.

    What it prints goes to no image: one during which it spoke of damage is decoded again while no other thread is.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.decoding = 0
        self.waiting = 0

    def hear(self, decode: Callable[[], Decoded]) -> tuple[Decoded, str]:
        """What `decode` gives, and what libjpeg says of damaged data; "" where it says nothing."""
        with self.changed:
            self.changed.wait_for(lambda: not self.waiting)
            self.decoding += 1
        before = printed()
        try:
            found = decode()
        finally:
            said = printed_after(before)
            with self.changed:
                self.decoding -= 1
                self.changed.notify_all()
        return found, self.hear_alone(decode) if said is None or DAMAGE.search(said) else ""

    def hear_alone(self, decode: Callable[[], object]) -> str:
        """What libjpeg says while `decode` runs and no other thread decodes."""
        with self.changed:
            self.waiting += 1
            self.changed.wait_for(lambda: not self.decoding)
            try:
                return damage_of(decode)
            finally:
                self.waiting -= 1
                self.changed.notify_all()


def damage_of(decode: Callable[[], object]) -> str:
    """What libjpeg says of damaged data while `decode` runs, and no other thread decodes; "" where it says nothing.

    It decodes such data all the same, as far as it goes, and says so by a line of C's standard error alone.
    """
    with suppress(UnreadableImage):
        for line in printed_by(decode).splitlines():
            if DAMAGE.match(line):
                return line.removeprefix("Corrupt JPEG data: ")
    return ""


def damaged_in_words(damaged: Mapping[str, str]) -> str:
    """How many JPEGs have damaged data, and what libjpeg says of the first; "" where none has.

    Args:
        damaged: what it says of each, by name.
    """
    if not damaged:
        return ""
    name, said = next(iter(damaged.items()))
    have = "1 JPEG has" if len(damaged) == 1 else f"{len(damaged):,} JPEGs have"
    return f"{have} damaged data, read as far as it goes, such as {name!r} ({said})"
