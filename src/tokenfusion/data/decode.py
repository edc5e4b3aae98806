"""One decoder for training and prediction: the bytes of an image file become the RGB that a person sees.

Plain JPEG goes through torchvision's decoder, which is the faster one, all else through Pillow. PNG and WebP too: a
single wrong byte in a PNG's data ends the process with a segmentation fault in torchvision 0.29.1.
"""

import os
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import TypeVar

import numpy as np
import torch
import torchvision.io  # noqa: F401 - loads torch.ops.image
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tokenfusion.errors import InputError

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"}
)
"""File name endings, in lower case, that mark an image."""

# Only formats that are decoded in this process: EPS, for one, would start Ghostscript.
Image.init()
WANTED = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"]
FORMATS = [name for name in WANTED if name in Image.OPEN]
MAX_SIDE = 2**16
"""Longest side that is decoded: of a line of pixels, resizing would make a picture that fits into no memory."""
THREADS = min(4, os.cpu_count() or 1)
"""Threads that decode at the same time."""
RGB = 3  # torchvision's ImageReadMode.RGB, as its operator takes it


Item = TypeVar("Item")
Decoded = TypeVar("Decoded")


class UnreadableImage(InputError):  # noqa: N818 - says what the image is
    """One image cannot be used. The message is the reason alone: which image it is, its source knows."""


def is_image(file: str) -> bool:
    """Whether a file's name ends like an image's."""
    return os.path.splitext(file)[1].lower() in EXTENSIONS


def decode_image(data: bytes, *, max_pixels: int) -> Tensor:
    """Decode an image file as a person sees it.

    EXIF orientation is applied, transparency lies on white, 16-bit values are scaled to 8 bits, gray becomes three
    equal channels, and of an animation the first frame is taken.

    Args:
        data: the file's bytes.
        max_pixels: largest height × width that is decoded; the header decides, before any pixel is.

    Returns:
        uint8 tensor (3, H, W).

    Raises:
        UnreadableImage: the bytes are no image, a damaged one, or one that is too large.
    """
    if not data:
        raise UnreadableImage("the file is empty (0 bytes)")
    try:
        with pillow_limit_lifted(), Image.open(BytesIO(data), formats=FORMATS) as image:
            refuse_large(image.height, image.width, max_pixels)
            if image.format == "PNG":  # whose checksums decoding alone does not look at; verifying uses an image up
                Image.open(BytesIO(data), formats=["PNG"]).verify()
                refuse_missing_rows(data, image)
            pixels = decode_plain(data) if is_plain(image) else None
            return F.pil_to_tensor(to_rgb(image)) if pixels is None else pixels
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"not an image; known formats are {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them trip over
        raise UnreadableImage(f"damaged image: {str(error) or type(error).__name__}") from error


def refuse_large(height: int, width: int, max_pixels: int) -> None:
    """Refuse an image of no pixels or too many, UnreadableImage."""
    if not 0 < min(width, height) <= max(width, height) <= MAX_SIDE:
        raise UnreadableImage(f"{width}×{height} has a side that is not 1 to {MAX_SIDE} pixels; cut it into parts")
    if width * height > max_pixels:
        raise UnreadableImage(
            f"{width}×{height} are {width * height} pixels, more than max_pixels={max_pixels}; "
            "shrink it or raise the limit"
        )


def refuse_missing_rows(data: bytes, image: Image.Image) -> None:
    """Refuse a PNG whose compressed rows end too early: Pillow leaves the rest black without a word.

    Counting the bytes costs a second decompression, so that only images that end in a row of zeros are counted.
    """
    image.load()
    last = np.asarray(image.crop((0, max(image.height - 2, 0), image.width, image.height)))  # one of each interlacing
    if all(row.any() for row in last):
        return
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    bits *= {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    wanted = 0
    for left, top, across, down in passes if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        wanted += rows * (1 + (columns * bits + 7) // 8) if columns > 0 else 0
    stream, found, place = zlib.decompressobj(), 0, 8
    while place + 8 <= len(data) and found < wanted and not stream.eof:
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        part = data[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        while part and found < wanted and not stream.eof:
            found += len(stream.decompress(part, 2**20))
            part = stream.unconsumed_tail
        place += 12 + size
    if found + len(stream.flush()) < wanted:
        raise UnreadableImage(f"damaged image: its rows end after {found:,} of {wanted:,} bytes")


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


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; upright where the metadata is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata is no reason to lose the picture
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as 8-bit RGB: upright, opaque on white, 16 bits scaled."""
    if image.mode in ("La", "RGBa"):  # colours that were multiplied by their opacity
        image = image.convert(image.mode.upper())
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not sixteen_bits:
        raise UnreadableImage(f"values of mode {image.mode} have no defined white; convert it to 8 or 16 bits")
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if sixteen_bits:  # the high byte, which is also what Pillow makes of 16-bit RGB
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_ahead(
    items: Iterable[Item], decode: Callable[[Item], Decoded], waiting: int = 2 * THREADS
) -> Iterator[tuple[Item, Decoded | UnreadableImage]]:
    """Decode by a few threads, in order, only so far ahead that few images wait in memory.

    Args:
        items: what to decode, taken one by one, so that they need not end.
        decode: called with each in one of the threads; what it gives is passed on, and so is an UnreadableImage that
            it raises.
        waiting: most images that are decoded, or being decoded, and not yet taken.

    Yields:
        each item, with what it decoded to or the reason why it cannot be.
    """

    def attempt(item: Item) -> Decoded | UnreadableImage:
        try:
            return decode(item)
        except UnreadableImage as error:
            return error

    begun: deque[tuple[Item, Future[Decoded | UnreadableImage]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for item in items:
                begun.append((item, pool.submit(attempt, item)))
                if len(begun) > waiting:
                    first, future = begun.popleft()
                    yield first, future.result()
            while begun:
                first, future = begun.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


lifted_lock = threading.Lock()
lifted = 0
pillow_limit: int | None = None


@contextmanager
def pillow_limit_lifted() -> Iterator[None]:
    """While `max_pixels` guards us, Pillow's own limit, which is one for the whole process and warns, stands aside.

    Counted, for threads decode at the same time; whoever leaves last puts the limit back.
    """
    global lifted, pillow_limit
    with lifted_lock:
        if lifted == 0:
            pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        lifted += 1
    try:
        yield
    finally:
        with lifted_lock:
            lifted -= 1
            if lifted == 0:
                Image.MAX_IMAGE_PIXELS = pillow_limit
