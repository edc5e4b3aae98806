import os
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from tokenfusion.data.decode import UnreadableImage, decode_ahead, decode_image, decode_plain, is_plain, to_rgb
from tokenfusion.errors import InputError

LIMIT = 10_000
NOISE = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:248:32j, 0:240:16j], 128), axis=-1).astype(np.uint8)  # (32, 16, 3)


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def decode(data: bytes) -> np.ndarray:
    """Decoded pixels as (H, W, 3), having checked what every decoded image must be."""
    image = decode_image(data, max_pixels=LIMIT)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    return png_of(width, height, bits, colour, zlib.compress(rows))


def png_of(width: int, height: int, bits: int, colour: int, packed: bytes) -> bytes:
    """A PNG by hand, for what Pillow cannot write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_rgb16(order: str, pixels: list[tuple[int, int, int]]) -> bytes:
    """One row of 16-bit RGB as an uncompressed TIFF by hand; order is < or >."""
    data = b"".join(struct.pack(f"{order}3H", *pixel) for pixel in pixels)
    entries = [
        (256, 3, len(pixels)),
        (257, 3, 1),
        (259, 3, 1),
        (262, 3, 2),
        (273, 4, 8),
        (277, 3, 3),
        (279, 4, len(data)),
    ]
    end = 8 + len(data)
    bits_at = end + 2 + 12 * (len(entries) + 1) + 4
    fields = [
        (tag, struct.pack(f"{order}HHI", tag, kind, 1) + value(order, kind, number)) for tag, kind, number in entries
    ]
    fields.append((258, struct.pack(f"{order}HHII", 258, 3, 3, bits_at)))
    directory = struct.pack(f"{order}H", len(fields)) + b"".join(field for _, field in sorted(fields)) + bytes(4)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, end)
    return head + data + directory + struct.pack(f"{order}3H", 16, 16, 16)


def value(order: str, kind: int, number: int) -> bytes:
    return struct.pack(f"{order}HH", number, 0) if kind == 3 else struct.pack(f"{order}I", number)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_lossless_formats_give_the_pixels_that_pillow_gives(kind: str, mode: str) -> None:
    data = encode(Image.fromarray(NOISE).convert(mode), kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data), expected)


@pytest.mark.parametrize(
    ("bits", "row", "expected"),
    [(1, 0b01000001, [0, 255, 0, 0, 0, 0, 0, 255]), (2, 0b00011011, [0, 85, 170, 255]), (4, 0x5A, [85, 170])],
)
def test_png_of_few_gray_levels_spreads_them_to_white(bits: int, row: int, expected: list[int]) -> None:
    assert decode(png(8 // bits, 1, bits, 0, bytes([0, row])))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"quality": 95, "subsampling": 0}, 2),
        ({"quality": 75, "subsampling": 2}, 3),
        ({"quality": 75, "progressive": True}, 3),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_both_decoders_see_the_same_jpeg(options: dict[str, Any], most: int, mode: str) -> None:
    data = encode(Image.fromarray(SMOOTH).convert(mode), "JPEG", **options)
    with Image.open(BytesIO(data)) as image:
        assert is_plain(image)
        by_pillow = np.asarray(to_rgb(image)).astype(int)
    plain = decode_plain(data)
    assert plain is not None
    assert abs(plain.permute(1, 2, 0).numpy().astype(int) - by_pillow).max() <= most
    assert np.array_equal(decode(data), plain.permute(1, 2, 0).numpy())


SEEN = {  # EXIF 2.32, table 4.6.4: how the stored rows and columns are to be shown
    1: lambda p: p,
    2: np.fliplr,
    3: lambda p: np.rot90(p, 2),
    4: np.flipud,
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    shown = decode(encode(SMOOTH, kind, exif=exif, **options)).astype(int)
    expected = SEEN[orientation](SMOOTH).astype(int)
    assert shown.shape == expected.shape
    assert abs(shown - expected).max() <= (3 if kind == "JPEG" else 0)


def test_damaged_exif_does_not_lose_the_picture() -> None:
    data = encode(NOISE, "PNG", exif=b"Exif\0\0nonsense")
    assert np.array_equal(decode(data), NOISE)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_on_white(kind: str) -> None:
    pixels = np.array([[[255, 0, 0, 128], [10, 20, 30, 0], [10, 20, 30, 255]]], dtype=np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert decode(encode(pixels, kind, **options)).tolist() == [[[255, 127, 127], [255, 255, 255], [10, 20, 30]]]


def test_gray_with_alpha_lies_on_white() -> None:
    pixels = np.array([[[0, 64], [100, 255], [100, 0]]], dtype=np.uint8)
    image = Image.fromarray(pixels, "LA")
    assert decode(encode(image, "PNG"))[0].tolist() == [[191] * 3, [100] * 3, [255] * 3]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(kind: str) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette([9, 8, 7, 60, 50, 40, 200, 100, 0])
    assert decode(encode(image, kind, transparency=1))[0].tolist() == [[9, 8, 7], [255, 255, 255], [200, 100, 0]]


def test_palette_with_an_alpha_per_entry() -> None:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert decode(encode(image, "PNG", transparency=bytes([255, 128])))[0].tolist() == [[0, 0, 0], [255, 127, 127]]


@pytest.mark.parametrize(("mode", "transparent"), [("RGB", (1, 2, 3)), ("L", 5)])
def test_a_transparent_colour_is_white(mode: str, transparent: Any) -> None:
    image = Image.new(mode, (2, 1), transparent)
    image.putpixel((1, 0), (7, 7, 7) if mode == "RGB" else 7)
    assert decode(encode(image, "PNG", transparency=transparent))[0].tolist() == [[255, 255, 255], [7, 7, 7]]


def test_cmyk_tiff_and_adobe_inverted_jpeg_show_the_same_inks() -> None:
    inks = {
        (255, 0, 0, 0): (0, 255, 255),
        (0, 255, 255, 0): (255, 0, 0),
        (0, 0, 0, 255): (0, 0, 0),
        (0, 0, 0, 0): (255,) * 3,
    }
    for ink, colour in inks.items():
        image = Image.new("CMYK", (8, 8), ink)
        jpeg = encode(image, "JPEG", quality=100)
        assert b"Adobe" in jpeg  # the marker by which inks are stored inverted
        assert decode(encode(image, "TIFF"))[3, 4].tolist() == list(colour)
        assert abs(decode(jpeg)[3, 4].astype(int) - colour).max() <= 2


DEEP = [0, 255, 256, 32768, 65535]
SCALED = [0, 0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_is_scaled_not_clipped(kind: str) -> None:
    data = encode(Image.fromarray(np.array([DEEP], dtype=np.uint16)), kind)
    assert decode(data)[0].tolist() == [[v] * 3 for v in SCALED]


def test_sixteen_bit_gray_of_the_other_byte_order() -> None:
    rows = b"\0" + struct.pack(">5H", *DEEP)
    assert decode(png(5, 1, 16, 0, rows))[0, :, 1].tolist() == SCALED
    tiff = encode(Image.frombytes("I;16B", (5, 1), struct.pack(">5H", *DEEP)), "TIFF")
    assert decode(tiff)[0, :, 2].tolist() == SCALED


def test_sixteen_bit_rgb_is_scaled_not_clipped() -> None:
    pixels = [(v, 65535 - v, 512) for v in DEEP]
    expected = [[v >> 8, (65535 - v) >> 8, 2] for v in DEEP]
    rows = b"\0" + b"".join(struct.pack(">3H", *pixel) for pixel in pixels)
    assert decode(png(5, 1, 16, 2, rows))[0].tolist() == expected
    assert decode(tiff_rgb16("<", pixels))[0].tolist() == expected
    assert decode(tiff_rgb16(">", pixels))[0].tolist() == expected


def test_sixteen_bit_rgb_with_alpha() -> None:
    rows = b"\0" + struct.pack(">8H", 65535, 0, 0, 32768, 0, 0, 0, 0)
    assert decode(png(2, 1, 16, 6, rows))[0].tolist() == [[255, 127, 127], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_without_a_defined_white_are_refused(mode: str) -> None:
    with pytest.raises(UnreadableImage, match=f"mode {mode} .*convert"):
        decode(encode(Image.new(mode, (3, 2)), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("#ff0000", "#0000ff")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(data).tolist() == np.full((4, 6, 3), (255, 0, 0)).tolist()


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "0 bytes"), (b"not an image at all", "not an image"), (bytes(99), "not an")]
)
def test_what_is_no_image_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode(data)
    assert isinstance(caught.value, InputError)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    whole = encode(np.tile(NOISE, (4, 4, 1)), kind)
    with pytest.raises(UnreadableImage):
        decode(whole[: int(len(whole) * share)])


def test_a_checksum_that_does_not_fit_is_refused() -> None:
    data = bytearray(encode(NOISE, "PNG"))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    with pytest.raises(UnreadableImage, match="damaged"):
        decode(bytes(data))


WHOLE = [encode(NOISE, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of damaged TIFF tags
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(WHOLE), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=9), st.data())
def test_damage_of_any_kind_gives_an_image_or_a_reason(data: bytes, damage: list[tuple[int, int]], draw: Any) -> None:
    broken = bytearray(data)
    for place, byte in damage:
        broken[place % len(broken)] = byte
    with suppress(UnreadableImage):
        decode(bytes(broken[: draw.draw(st.integers(0, len(broken)))]))


def test_max_pixels_is_the_last_size_that_is_decoded() -> None:
    data = encode(NOISE, "PNG")  # 7 × 11
    assert decode_image(data, max_pixels=77).shape == (3, 7, 11)
    with pytest.raises(UnreadableImage, match=r"11×7 are 77 pixels, more than max_pixels=76"):
        decode_image(data, max_pixels=76)


@pytest.mark.filterwarnings("error")
def test_an_image_of_20000_by_20000_is_refused_by_its_header() -> None:
    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(2501)) for _ in range(20_000)) + rows.flush()
    whole = png_of(20_000, 20_000, 1, 0, packed)
    with pytest.raises(UnreadableImage, match="20000×20000 are 400000000 pixels"):
        decode_image(whole, max_pixels=100_000_000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize(
    "pillow_limit", [50, 20]
)  # above it Pillow warns of our 77 pixels, above twice it refuses them
def test_pillow_has_no_say_in_what_is_too_large(kind: str, pillow_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(NOISE, kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    assert decode(data).shape == NOISE.shape
    assert pillow_limit == Image.MAX_IMAGE_PIXELS


def test_threads_leave_pillows_limit_as_they_found_it() -> None:
    before = Image.MAX_IMAGE_PIXELS
    data = encode(Image.fromarray(NOISE).convert("P"), "PNG")
    threads = [threading.Thread(target=lambda: [decode(data) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings("error")
def test_no_deprecation_is_warned_of() -> None:
    decode(encode(NOISE, "JPEG"))


def test_decoding_ahead_keeps_the_order_and_goes_only_so_far() -> None:
    begun: list[int] = []

    def decode(number: int) -> int:
        if number % 3 == 0:
            raise UnreadableImage(f"{number} is damaged")
        return -number

    def numbers() -> Iterator[int]:
        for number in count():  # without end
            begun.append(number)
            yield number

    results = decode_ahead(numbers(), decode, waiting=5)
    for number, (item, result) in zip(range(20), results, strict=False):
        assert item == number
        assert str(result) == (f"{number} is damaged" if number % 3 == 0 else str(-number))
        assert len(begun) <= number + 7
    results.close()
    assert list(decode_ahead([], decode)) == []


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_marker_is_read_and_one_without_pixels_refused(mode: str, progressive: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", quality=90, progressive=progressive)
    data = file.getvalue()
    assert data.endswith(b"\xff\xd9")
    whole = decode_image(data, max_pixels=10_000)
    for cut in (1, 2):
        assert torch.equal(decode_image(data[:-cut], max_pixels=10_000), whole)
    for cut in (40, len(data) // 3):
        with pytest.raises(UnreadableImage, match="damaged"):
            decode_image(data[:-cut], max_pixels=10_000)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_was_cut_and_ended_by_a_marker_is_refused(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG")
    data = file.getvalue()
    with pytest.raises(UnreadableImage, match="its data ends before its last pixels"):
        decode_image(data[: len(data) // 3] + b"\xff\xd9", max_pixels=10_000)


def test_a_flat_jpeg_without_pixels_is_refused() -> None:
    file = BytesIO()
    Image.new("RGB", (640, 480), (128, 128, 128)).save(file, "JPEG")
    with pytest.raises(UnreadableImage, match="damaged"):
        decode_image(file.getvalue()[:-400], max_pixels=10**6)


def test_no_library_says_anything_of_damaged_files(capfd: pytest.CaptureFixture[str]) -> None:
    """libjpeg and libtiff print by themselves, Pillow warns and logs; why a file cannot be read is ours to say."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind, options in (("JPEG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})):
            whole = encode(pixels, kind, **options)
            for trial in range(200):
                data = bytearray(whole)
                for place in random.integers(2 if trial % 2 else len(whole) - 200, len(whole), 4):
                    data[place] ^= 0x55
                with suppress(UnreadableImage):
                    decode_image(bytes(data[: -(trial % 50) or None]), max_pixels=LIMIT)
    assert [str(warning.message) for warning in caught if "PIL" in warning.filename] == []
    assert capfd.readouterr() == ("", "")
    print("said", file=sys.stderr)
    os.write(2, b"and heard")
    assert capfd.readouterr().err == "said\nand heard"
