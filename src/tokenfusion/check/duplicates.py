"""Exact and near duplicates.

Exact ones have the same decoded pixels. Near ones are found in two steps, so that no pair is looked at in Python: a
descriptor (the low frequencies of the cosine transform, as a perceptual hash has them, but not rounded to bits) of an
image and of mild crops of it is compared with every image's by one matrix product a block; pairs that are alike
are then aligned and their details compared (`lucas_kanade.py`).
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from tokenfusion.check.inspection import SIDE, Inspection
from tokenfusion.check.lucas_kanade import details, likeness

MAX_IMAGES = 100_000
"""Most images among which near duplicates are searched: the work grows with the square of their number."""
MIN_SIDE = 24
"""Shortest side, in pixels, of an image that has enough detail to tell a near duplicate."""
MIN_DETAIL = 1.0
"""Least root mean square of the details, of 255; below, an image is too plain."""
SIMILAR = 0.9
"""Correlation of descriptors from which a pair is looked at closely."""
SAME = 0.8
"""Correlation of details from which a pair is the same picture: what is left of it in copies that were resampled and
encoded anew. `benchmarks/check.py` measures which share of copies reaches it, and of different pictures."""
NEIGHBOURS = 16
"""Most similar images that are looked at for each image."""
FREQUENCIES = 8
BLOCK = 512


class Pair(NamedTuple):
    """Two images that show the same picture."""

    first: int
    second: int
    likeness: float
    """Correlation of their details, up to 1."""


@dataclass(frozen=True)
class NearDuplicates:
    """What a search for near duplicates found."""

    pairs: list[Pair]
    searched: int
    """Images that took part."""
    too_small: int
    too_plain: int
    """Images that did not, for want of detail."""


def exact_duplicates(inspections: list[Inspection]) -> list[list[int]]:
    """Groups of images with the same pixels, each in ascending order."""
    groups = defaultdict(list)
    for index, image in enumerate(inspections):
        if image.digest:
            groups[image.digest].append(index)
    return [group for group in groups.values() if len(group) > 1]


def near_duplicates(inspections: list[Inspection], progress: Callable[[int, int], None]) -> NearDuplicates:
    """Pairs of images that show the same picture: re-encoded, resized, or mildly cropped.

    Args:
        inspections: of every image, up to MAX_IMAGES; of exact duplicates only the first takes part.
        progress: called with (images done, images in all).
    """
    firsts = {image.digest: index for index, image in reversed(list(enumerate(inspections))) if image.digest}
    large = [i for i in sorted(firsts.values()) if min(inspections[i].height, inspections[i].width) >= MIN_SIDE]
    images = torch.empty(len(large), 1, SIDE, SIDE)  # filled in place: it may be a gigabyte
    chosen: list[int] = []
    for start in range(0, len(large), BLOCK):
        block = large[start : start + BLOCK]
        part = gray(torch.stack([inspections[index].thumbnail for index in block]))
        detailed = details(part).square().mean((1, 2, 3)).sqrt() >= MIN_DETAIL
        images[len(chosen) : len(chosen) + int(detailed.sum())] = part[detailed]
        chosen += [index for index, fine in zip(block, detailed.tolist(), strict=True) if fine]
    images = images[: len(chosen)]
    pairs = []
    found = candidates(images, progress)
    for some in torch.split(found, BLOCK) if len(found) else ():
        values = likeness(images[some[:, 0]], images[some[:, 1]]).tolist()
        for (a, b), value in zip(some.tolist(), values, strict=True):
            if value >= SAME:
                pairs.append(Pair(chosen[a], chosen[b], round(value, 3)))
    return NearDuplicates(
        pairs=sorted(pairs, key=lambda pair: -pair.likeness),
        searched=len(chosen),
        too_small=len(firsts) - len(large),
        too_plain=len(large) - len(chosen),
    )


def gray(thumbnails: Tensor) -> Tensor:
    """Brightness, float (B, 1, S, S), of uint8 (B, 3, S, S); weights of ITU-R BT.601."""
    red, green, blue = (thumbnails[:, k : k + 1].float() for k in range(3))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def candidates(images: Tensor, progress: Callable[[int, int], None]) -> Tensor:
    """Pairs, int64 (P, 2), of gray thumbnails (N, 1, S, S) whose descriptors are alike."""
    if len(images) < 2:
        return torch.empty(0, 2, dtype=torch.int64)
    whole = torch.cat([descriptors(part) for part in torch.split(images, BLOCK)])
    found = set()
    for start in range(0, len(images), BLOCK):
        rows = min(BLOCK, len(images) - start)
        similar, product = torch.full((rows, len(images)), -1.0), torch.empty(rows, len(images))
        for crop in mild_crops(images[start : start + BLOCK]):
            torch.maximum(similar, torch.mm(descriptors(crop), whole.T, out=product), out=similar)
        similar[torch.arange(len(similar)), torch.arange(start, start + len(similar))] = -1
        values, others = similar.topk(min(NEIGHBOURS, len(images) - 1))
        row, column = torch.nonzero(values >= SIMILAR, as_tuple=True)
        pairs = torch.stack([row + start, others[row, column]]).sort(0).values
        found |= set(zip(*pairs.tolist(), strict=True))
        progress(start + len(similar), len(images))
    return torch.tensor(sorted(found), dtype=torch.int64).reshape(-1, 2)


def mild_crops(images: Tensor) -> list[Tensor]:
    """The images, and the same without a twelfth at each choice of their sides."""
    side = images.shape[-1]
    cut = side // 12
    spans = [slice(start, side - end) for start in (0, cut) for end in (0, cut)]
    return [images[..., across, along] for across in spans for along in spans]


def descriptors(images: Tensor) -> Tensor:
    """The lowest frequencies but the mean, float (B, FREQUENCIES² - 1), each of length 1, of (B, 1, S, S)."""
    side = 4 * FREQUENCIES
    small = interpolate(images, (side, side), mode="bilinear", antialias=True)[:, 0]
    angles = torch.pi / side * torch.arange(FREQUENCIES)[:, None] * (torch.arange(side) + 0.5)
    basis = normalize(angles.cos(), dim=1)
    return normalize((basis @ small @ basis.T).flatten(1)[:, 1:], dim=1)
