"""One range of values for images of more than 8 bits: as it is given, or found in a few of the training images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tokenfusion.data.dataset import Dataset, printable
from tokenfusion.data.decode import ValueRange, decode_ahead, deep_colour, deep_values

STRETCHES, LENGTH = 32, 8
"""The images that are looked at: so many stretches of so many images each, so that few parts of a file are read."""
RARE = 0.001
"""Share of an image's values at either end that decide nothing, such as those of a sensor's broken pixels."""
MOST_VALUES = 1_000_000
"""Values of an image that its rare ones are told by."""
DARK = 63
"""Highest value, to 255, of colour images of 16 bits that are warned of: two bits or more are not used."""
STRETCHED = 4
"""How many times as wide a range may become by its rarest images: two bits are lost to the others."""
LOST = 64
"""Where it would become so many times as wide, the others would keep four shades of gray: these images or values then
decide nothing."""
FEW = 32
"""Shades of gray; where most images use fewer, the range is warned of."""
LEAST = 5
"""Images of which one may be unlike the others."""
EIGHT_BITS = (".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp")
"""Endings of files that never have more."""


@dataclass(frozen=True)
class Values:
    """The finite values of a deep image."""

    name: str
    least: float
    greatest: float
    low: float
    high: float
    """Without the rare ones."""
    whole: bool
    """Whether they are integers."""
    width: float
    """What most of them span, without a least or greatest one that lies apart."""
    lone: float | None = None
    """The least or greatest value where it lies far from all others, as what stands for no value (-3.4e38) does."""


def with_value_range(
    dataset: Dataset, indices: np.ndarray, given: Sequence[float], max_pixels: int
) -> tuple[Dataset, str]:
    """A dataset whose deep images are scaled by one range.

    Args:
        dataset: the images.
        indices: which of them are trained on; a range is found in these, see `sample`.
        given: the range that is asked for; empty to find one.
        max_pixels: largest height × width that is decoded.

    Returns:
        the dataset, and what was found, in words; without a range and "" where no image has more than 8 bits.
    """
    looked_at = sample(indices, dataset.shards)
    found = [value for _, value in decode_ahead(looked_at, lambda index: values_of(dataset, index, max_pixels))]
    deep = [value for value in found if isinstance(value, Values)]
    dark = dark_in_words([value for value in found if isinstance(value, int)])
    if given:
        low_high = (float(given[0]), float(given[1]))
        return replace(dataset, value_range=low_high), given_in_words(
            low_high, deep, len(looked_at)
        ) + f"; {dark}" * bool(dark)
    if not deep:
        return dataset, dark
    near, far = told_apart(deep)
    low_high = find_range(near)
    share = f"{len(deep):,} of the {len(looked_at):,} training images looked at, which have more than 8 bits"
    line = (
        f"value range: {in_words(low_high)}, found in {share}; what lies beyond is cut off (--value-range sets another)"
    )
    said = (
        lone_in_words(near, low_high),
        far_in_words(far) or stretched_in_words(near) or few_in_words(near, low_high),
        dark,
    )
    return replace(dataset, value_range=low_high), "; ".join([line, *(words for words in said if words)])


def most(deep: Sequence[Values]) -> ValueRange:
    """The lowest and the highest value but for a tenth of the images at either end."""
    low = np.quantile([image.low for image in deep], 0.1, method="higher")
    return float(low), float(np.quantile([image.high for image in deep], 0.9, method="lower"))


def told_apart(deep: Sequence[Values]) -> tuple[list[Values], list[Values]]:
    """The images that make the range, and those that would leave the others next to nothing of it."""
    low, high = most(deep)
    room = LOST * (high - low)
    far = [image for image in deep if image.low < low - room or image.high > high + room]
    if not room > 0 or len(deep) < LEAST or 10 * len(far) > max(10, len(deep)):
        return list(deep), []
    return [image for image in deep if image not in far], far


def far_in_words(far: Sequence[Values]) -> str:
    """A warning of images that make no part of the range; "" where there are none."""
    if not far:
        return ""
    have = "1 of these images has" if len(far) == 1 else f"{len(far):,} of these images have"
    return (
        f"warning: {have} values so far from all others' that they make no part of the range, such as {far[0].name!r} "
        f"with {in_words((far[0].low, far[0].high))}: they are cut off, or the image refused; mend it, or take it away"
    )


def lone_in_words(deep: Sequence[Values], low_high: ValueRange) -> str:
    """Which values make no part of the range, as they stand for none; "" where none are."""
    low, high = low_high
    lone = [(value, image.name) for image in deep if (value := image.lone) is not None and not low <= value <= high]
    if not lone:
        return ""
    return f"values far from all others of their image make no part of it, such as {lone[0][0]:.9g} in {lone[0][1]!r}"


def stretched_in_words(deep: Sequence[Values]) -> str:
    """A warning where a tenth of the images or fewer make the range more than four times as wide; "" where not."""
    low, high = most(deep)
    outer = min(image.low for image in deep), max(image.high for image in deep)
    if outer[1] - outer[0] <= STRETCHED * (high - low):
        return ""
    far = [image for image in deep if image.low < low or image.high > high]
    return (
        f"warning: {len(far):,} of these images have values far from the others', {in_words((low, high))}, such as "
        f"{far[0].name!r} with {in_words((far[0].low, far[0].high))}: most images keep few shades of gray; take these "
        "away, or give --value-range LOW HIGH"
    )


def few_in_words(deep: Sequence[Values], low_high: ValueRange) -> str:
    """A warning where most images use few of the shades of gray that the range has; "" where not."""
    widths = np.array([image.width for image in deep])
    shades = 256 * float(np.median(widths)) / (low_high[1] - low_high[0])
    if not 0 < shades < FEW:
        return ""
    usual = deep[int(np.argsort(widths)[len(widths) // 2])]
    return (
        f"warning: most values of most images lie within {FEW} of 256 shades of gray, as those of {usual.name!r}, "
        f"which span {usual.width:.9g}; give --value-range LOW HIGH for more"
    )


def dark_in_words(greatest: Sequence[int]) -> str:
    """A warning of colour images of 16 bits that use so few of them that nearly nothing is left; "" of others.

    Args:
        greatest: the greatest value of each, to 255.
    """
    if not greatest or max(greatest) > DARK:
        return ""
    return (
        f"warning: colour images of 16 bits ({len(greatest):,} looked at) are nearly black, for the high byte of each "
        f"channel is read, and these end at {max(greatest)} of 255; convert them to 8 bits"
    )


def sample(indices: np.ndarray, shards: np.ndarray | None = None) -> list[int]:
    """Some of the indices, in stretches that are spread evenly; of images in shards (N,) those of the first one, for a
    shard is fetched whole."""
    if shards is not None:
        indices = indices[shards[indices] == shards[indices[:1]]]
    if shards is not None or len(indices) <= STRETCHES * LENGTH:
        return indices[: STRETCHES * LENGTH].tolist()
    starts = np.linspace(0, len(indices) - LENGTH, STRETCHES).round().astype(np.int64)
    return indices[np.unique(starts[:, None] + np.arange(LENGTH))].tolist()


def values_of(dataset: Dataset, index: int, max_pixels: int) -> Values | int | None:
    """What values a gray image has, or where those of a colour image of 16 bits end, to 255; None where it has 8 bits,
    or no finite value.

    Raises:
        UnreadableImage: it cannot be read.
    """
    name = dataset.names[index]
    if name.lower().endswith(EIGHT_BITS):
        return None
    data = dataset.read(index)
    if not isinstance(data, bytes):
        return None
    values = deep_values(data, max_pixels=max_pixels)
    return deep_colour(data, max_pixels=max_pixels) if values is None else summary_of(name, values)


def summary_of(name: str, values: np.ndarray) -> Values | None:
    """The finite values (H, W) of an image in a few numbers; None where there are none."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    some = finite[:: -(-finite.size // MOST_VALUES)].astype(np.float64)
    some, lone = without_lone(some, LOST)
    together, _ = without_lone(some, STRETCHED)
    width = float(np.ptp(together))
    low, high = np.quantile(some, RARE, method="lower"), np.quantile(some, 1 - RARE, method="higher")
    whole = values.dtype.kind in "ui"
    return Values(
        printable(name), float(finite.min()), float(finite.max()), float(low), float(high), whole, width, lone
    )


def without_lone(values: np.ndarray, times: float) -> tuple[np.ndarray, float | None]:
    """Values (N,) without the least or the greatest where these lie far from all others, by more than `times` what the
    others span; and one of those."""
    lone = None
    for end in (values.min(), values.max()):
        others = values[values != end]
        if others.size:
            low, high = others.min(), others.max()
            if min(abs(end - low), abs(end - high)) > times * (high - low) > 0:
                values, lone = others, float(end)
    return values, lone


def find_range(deep: Sequence[Values]) -> ValueRange:
    """The range that holds all the images' values but the rare ones.

    Of integers from 0 on, it ends where so many bits do: at 4095 where the highest value is 3,000.
    """
    low, high = min(image.low for image in deep), max(image.high for image in deep)
    if low >= 0 and all(image.whole for image in deep):
        return 0.0, float(2 ** max(int(high).bit_length(), 1) - 1)
    return low, high if high > low else max(low + 1, float(np.nextafter(low, np.inf)))


def given_in_words(given: ValueRange, deep: Sequence[Values], looked_at: int) -> str:
    """What a given range does to the images that were looked at."""
    if not deep:
        return f"value range: {in_words(given)} as given, though none of {looked_at:,} images has more than 8 bits"
    beyond = [image for image in deep if image.least < given[0] or image.greatest > given[1]]
    first = f", such as {beyond[0].name!r} with {in_words((beyond[0].least, beyond[0].greatest))}" if beyond else ""
    return (
        f"value range: {in_words(given)} as given; {len(beyond):,} of {len(deep):,} images looked at have values "
        f"beyond it, which are cut off{first}"
    )


def in_words(value_range: ValueRange) -> str:
    return f"{value_range[0]:.9g} to {value_range[1]:.9g}"
