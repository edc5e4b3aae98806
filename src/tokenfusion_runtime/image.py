"""Images as a person sees them, by Pillow alone: the rules that training and every prediction share."""

import ctypes
import importlib
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from tokenfusion_runtime.decoding import decoding
from tokenfusion_runtime.errors import InputError, UnreadableImage

Pixels = NDArray[np.uint8]
ValueRange = tuple[float, float]
"""The values of a deep image that become black and white."""

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"}
)
"""File name endings, in lower case, that mark an image."""

# Only formats that are decoded in this process: EPS, for one, would start Ghostscript. No other plugin is imported,
# which takes half the time of all.
WANTED = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"]
for plugin in ("Jpeg", "Png", "WebP", "Gif", "Bmp", "Tiff", "Ppm", "Jpeg2K", "Avif"):
    with suppress(ImportError):  # as of AVIF in an older Pillow
        importlib.import_module(f"PIL.{plugin}ImagePlugin")
FORMATS = [name for name in WANTED if name in Image.OPEN]


MAX_SIDE = 2**16
"""Longest side that is decoded: of a line of pixels, resizing would make a picture that fits into no memory."""
LARGE = 2**24
"""Pixels from which on images are decoded one at a time: each takes about ten bytes a pixel while it is decoded."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_image(file: str) -> bool:
    """Whether a file's name ends like an image's."""
    return os.path.splitext(file)[1].lower() in EXTENSIONS


@contextmanager
def opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """An image file's header, read and checked, while its pixels are decoded.

    Args:
        data: the file's bytes.
        max_pixels: largest height × width that is decoded; the header decides, before any pixel is.

    Raises:
        UnreadableImage: the bytes are no image, a damaged one, or one that is too large; within the block, whatever
            decoding trips over is raised as that too.
    """
    if not data:
        raise UnreadableImage("the file is empty (0 bytes)")
    if data.startswith(LFS_POINTER):
        raise UnreadableImage("a pointer of Git LFS, not the image itself; fetch it by `git lfs pull`")
    try:
        with decoding(), Image.open(BytesIO(with_end(data, max_pixels)), formats=FORMATS) as image:
            refuse_large(image.height, image.width, max_pixels)
            with alone_if_large(image.height * image.width):
                if image.format == "PNG":  # whose checksums decoding alone does not look at; verifying uses it up
                    Image.open(BytesIO(data), formats=["PNG"]).verify()
                    refuse_missing_rows(data, image)
                yield image
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"not an image; known formats are {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them trip over
        raise UnreadableImage(f"damaged image: {str(error) or type(error).__name__}") from error


def with_end(data: bytes, max_pixels: int) -> bytes:
    """A JPEG that lacks its end marker alone, given one; any other file, and one whose pixels are missing, as it is.

    Whatever stands behind a scan that is whole is not read: with two endings, of which one goes on with other bits, a
    whole image is the same twice. libjpeg itself makes up what is missing without an error.
    """
    if not data.startswith(b"\xff\xd8") or data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda"):
        return data
    body = data.removesuffix(b"\xff")
    endings = (b"\xff\xd9", b"\x55" * 4096 + b"\xff\xd9")
    one, other = (Image.open(BytesIO(body + ending), formats=["JPEG"]) for ending in endings)
    refuse_large(one.height, one.width, max_pixels)
    with alone_if_large(one.height * one.width):
        return body + endings[0] if np.array_equal(np.asarray(one), np.asarray(other)) else data


large_lock = threading.RLock()
large = threading.local()


def forget_threads() -> None:
    """In a child of fork no other thread goes on, and what they held would be waited for forever."""
    global large_lock
    large_lock = threading.RLock()


os.register_at_fork(after_in_child=forget_threads)


@contextmanager
def alone_if_large(pixels: int) -> Iterator[None]:
    """Decode a large image while no other one is, and within `large_ones_alone` until that ends."""
    with ExitStack() as here:
        if pixels > LARGE:
            held = getattr(large, "until", here)
            held.enter_context(large_lock)
            held.callback(give_back_memory)
        yield


def give_back_memory() -> None:
    """Let glibc give freed memory back to the system, which otherwise stays with the thread that had it."""
    if os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


@contextmanager
def large_ones_alone() -> Iterator[None]:
    """Decode an image and make it small: if it is a large one, no other is in memory meanwhile."""
    with ExitStack() as large.until:
        try:
            yield
        finally:
            del large.until


def refuse_large(height: int, width: int, max_pixels: int) -> None:
    """Refuse an image of no pixels or too many, UnreadableImage."""
    if not 0 < min(width, height) <= max(width, height) <= MAX_SIDE:
        raise UnreadableImage(f"{width}×{height} has a side that is not 1 to {MAX_SIDE} pixels; cut it into parts")
    if width * height > max_pixels:
        raise UnreadableImage(
            f"{width}×{height} are {width * height} pixels, more than max_pixels={max_pixels}; "
            "shrink it or raise the limit"
        )


def refuse_missing_blocks(data: bytes, last: Sequence[int]) -> None:
    """Refuse a JPEG whose data ends before its last block, although its end marker is there: libjpeg makes up the rest.

    Only an image whose last pixel is of the gray that it takes for it is looked at: what stands before the marker is
    then part of the image, or not. A progressive JPEG that lacks a later scan has all its pixels, and is read.

    Args:
        data: the file's bytes.
        last: the values of the image's last pixel; 127 is the gray of inks, whose values are turned around.
    """
    end = data.rfind(b"\xff\xd9")
    if any(value not in (127, 128) for value in last) or end < data.rfind(
        b"\xff\xda"
    ):  # of one without a marker, see `with_end`
        return
    body = data[:end]
    endings = (b"\xff\xd9", b"\x55" * 4096 + b"\xff\xd9")
    one, other = (Image.open(BytesIO(body + ending), formats=["JPEG"]) for ending in endings)
    if not np.array_equal(np.asarray(one), np.asarray(other)):
        raise UnreadableImage("damaged image: its data ends before its last pixels")


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


def pillow_image(image: object, max_pixels: int, value_range: ValueRange | None = None) -> Image.Image:
    """An array, or an image of Pillow's as it is.

    Args:
        image: uint8 (H, W), (H, W, 1), (H, W, 3) of RGB, or (H, W, 4); or a PIL image; with a value range also any
            numbers (H, W).
        max_pixels: largest height × width that is taken.
        value_range: what becomes black and white of other numbers than uint8.

    Raises:
        UnreadableImage: it has too many pixels, or a PIL image none.
        InputError: it is something else.
    """
    if isinstance(image, np.ndarray):
        if image.ndim > 1 and image.size:
            refuse_large(image.shape[0], image.shape[1], max_pixels)  # a view may be larger than the memory
        if value_range is not None and image.ndim == 2 and image.size and image.dtype.kind in "uif":
            image = image if image.dtype == np.uint8 else scaled(image, value_range)
        if not image.size or image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in CHANNELS:
            raise InputError(
                f"an array of shape {image.shape} and type {image.dtype} is not an image; "
                "give uint8 (H, W), (H, W, 3) or (H, W, 4)"
            )
        image = Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image)
    if not isinstance(image, Image.Image):
        raise InputError(
            f"{type(image).__name__} is not an image; give a path, bytes, a uint8 array (H, W, 3) of RGB or a PIL image"
        )
    refuse_large(image.height, image.width, max_pixels)
    return image


CHANNELS = ((), (1,), (3,), (4,))
"""What may stand behind an array's height and width."""


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; upright where the metadata is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata is no reason to lose the picture
        return 1


def whole_rgb(image: Image.Image, data: bytes, value_range: ValueRange | None = None) -> Image.Image:
    """An opened image file as `to_rgb` has it, refused where a JPEG's data ends too early."""
    image.load()
    if image.format == "JPEG" and image.mode in ("L", "RGB", "CMYK"):
        last = image.getpixel((image.width - 1, image.height - 1))
        refuse_missing_blocks(data, last if isinstance(last, tuple) else [int(last or 0)])
    return to_rgb(image, value_range)


def to_rgb(image: Image.Image, value_range: ValueRange | None = None) -> Image.Image:
    """Any of Pillow's modes as 8-bit RGB: upright, opaque on white, deeper values scaled.

    Args:
        image: as Pillow opens it.
        value_range: of a gray image of more than 8 bits, what becomes black and white; without it these are 0 and
            65535 of 16 bits, and unknown of floats and of 32 bits, which are refused.
    """
    if image.mode in ("La", "RGBa"):  # colours that were multiplied by their opacity
        image = image.convert(image.mode.upper())
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if is_deep(image):
        image = Image.fromarray(in_eight_bits(image, value_range, sixteen_bits))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # converting copies


def is_deep(image: Image.Image) -> bool:
    """Whether an image is gray and has more than 8 bits a pixel: 16, 32, or floats."""
    return image.mode == "F" or image.mode.startswith("I")


def in_eight_bits(image: Image.Image, value_range: ValueRange | None, sixteen_bits: bool) -> Pixels:
    """The values of a deep image from black, 0, to white, 255; without a range only those of 16 bits are known."""
    values = np.asarray(image)
    if value_range is not None:
        return scaled(values, value_range)
    if not sixteen_bits:
        raise UnreadableImage(
            f"values of mode {image.mode} have no defined white; convert it to 8 or 16 bits, or train with "
            "--value-range LOW HIGH"
        )
    return (values >> 8).astype(np.uint8)  # the high byte, which is also what Pillow makes of 16-bit RGB


def scaled(values: NDArray[Any], value_range: ValueRange) -> Pixels:
    """Values (H, W) of any type as uint8: of the range's two ends one is 0 and the other 255.

    What lies beyond is cut off, and what is not a number is 0.

    Raises:
        UnreadableImage: no value is finite, none lies in the range, or more than half lie above it, as those of an
            image in another unit do.
    """
    low, high = value_range
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise UnreadableImage("none of its values is a finite number")
    if (finite < low).all() or (finite > high).mean() > 0.5:
        raise UnreadableImage(
            f"its values, {finite.min():.9g} to {finite.max():.9g}, lie outside the value range {low:.9g} to "
            f"{high:.9g} of the training images; convert it to their unit, or train with another --value-range"
        )
    with np.errstate(all="ignore"):  # values that float32 cannot tell apart become black or white
        shares = (values.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.rint(255 * np.nan_to_num(shares, nan=0.0).clip(0, 1)).astype(np.uint8)


def prepare(image: Image.Image, preprocess: dict[str, Any]) -> Pixels:
    """An RGB image as the model wants it, uint8 (in_chans, h, w): resized to cover its size, and the centre cropped.

    Within two grey levels of what the run does, hardly ever more than one: its resize is another implementation of the
    same filter, and both round twice.

    Args:
        image: of any size.
        preprocess: as `model.json` has it.
    """
    height, width = preprocess["img_size"]
    crop_pct, size = preprocess["crop_pct"], (image.height, image.width)
    if size != (height, width) or crop_pct != 1:
        bicubic = preprocess.get("interpolation") == "bicubic"  # as pretrained weights want it, with timm's sizes
        whole = math.floor if bicubic else round
        targets = [math.floor(side / crop_pct) if bicubic else side / crop_pct for side in (height, width)]
        scale = max(side / now for side, now in zip(targets, size, strict=True))
        # as the run does, drop first, far from the crop's edge, what a long thin image would drop anyway
        needed = [2 * math.ceil(side / scale) for side in (height, width)]
        kept = [min(now, side + (now - side) % 2) for side, now in zip(needed, size, strict=True)]
        image = centre(image, *kept)
        sides = zip((height, width), (image.height, image.width), strict=True)
        rows, columns = (max(side, whole(now * scale + 1e-9 * bicubic)) for side, now in sides)
        filtered = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        image = centre(image.resize((columns, rows), filtered), height, width)
    pixels = np.asarray(image)
    if preprocess["in_chans"] == 1:
        red, green, blue = (pixels[..., channel].astype(np.float32) for channel in range(3))
        return (0.2989 * red + 0.587 * green + 0.114 * blue).astype(np.uint8)[None]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def centre(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of an image that is at least so large."""
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))
