"""Held-out images made worse, as sensors, lenses and networks do it, and what each corruption costs.

Images are changed as the model gets them: resized, of 8 bits, before they are normalised. What is random follows from
the image's place in the data, so that models of one preprocessing meet the same images.

Source of the kinds: Hendrycks and Dietterich, Benchmarking Neural Network Robustness, ICLR 2019 (noise, blur, JPEG,
contrast); Naseer et al., Intriguing Properties of Vision Transformers, NeurIPS 2021 (occlusion, patches shuffled). The
severities are ours.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tokenfusion.intervals import tango_interval
from tokenfusion.metrics import share_interval

Change = Callable[[Tensor, float, torch.Generator], Tensor]
"""From an image, uint8 (C, H, W), its severity and a source of chance to the worse image."""


def add_noise(image: Tensor, std: float, random: torch.Generator) -> Tensor:
    """Gaussian noise, its standard deviation a share of the range of values."""
    noise = torch.randn(image.shape, generator=random) * (255 * std)
    return (image + noise).round().clamp(0, 255).to(torch.uint8)


def blur(image: Tensor, share: float, _: torch.Generator) -> Tensor:
    """Gaussian blur, its standard deviation a share of the shorter side."""
    side = min(image.shape[-2:])
    reach = min(math.ceil(3 * share * side), side - 1)
    return F.gaussian_blur(image, [2 * reach + 1] * 2, [share * side] * 2)


def compress(image: Tensor, quality: float, _: torch.Generator) -> Tensor:
    """JPEG of some quality, from 1 to 100."""
    return F.jpeg(image, int(quality))


def fade(image: Tensor, factor: float, _: torch.Generator) -> Tensor:
    """Differences from the image's mean gray, times a factor below 1."""
    return F.adjust_contrast(image, factor)


def occlude(image: Tensor, share: float, random: torch.Generator) -> Tensor:
    """A rectangle of the image's shape and of a share of its area, anywhere, in the image's mean colour."""
    height, width = (max(1, round(side * math.sqrt(share))) for side in image.shape[-2:])
    top, left = (
        int(torch.randint(side - part + 1, (), generator=random))
        for side, part in zip(image.shape[-2:], (height, width), strict=True)
    )
    mean = image.float().mean((1, 2)).round().to(torch.uint8)
    return F.erase(image, top, left, height, width, mean[:, None, None])


def shuffle_patches(image: Tensor, pieces: float, random: torch.Generator) -> Tensor:
    """So many pieces a side, in random order; what is left over at the right and the bottom stays."""
    channels, *sides = image.shape
    rows, columns = (min(int(pieces), side) for side in sides)
    high, wide = sides[0] // rows, sides[1] // columns
    whole = image[:, : rows * high, : columns * wide]
    cut = whole.reshape(channels, rows, high, columns, wide).permute(1, 3, 0, 2, 4).flatten(0, 1)
    cut = cut[torch.randperm(len(cut), generator=random)].reshape(rows, columns, channels, high, wide)
    shuffled = image.clone()
    shuffled[:, : rows * high, : columns * wide] = cut.permute(2, 0, 3, 1, 4).reshape(whole.shape)
    return shuffled


@dataclass(frozen=True)
class Corruption:
    """A kind of damage, from mild to strong."""

    change: Change
    severities: tuple[float, float, float]
    unit: str
    """What a severity measures."""


CORRUPTIONS: Mapping[str, Corruption] = {
    "noise": Corruption(add_noise, (0.04, 0.08, 0.16), "standard deviation, of the range of values"),
    "blur": Corruption(blur, (0.01, 0.02, 0.04), "standard deviation, of the shorter side"),
    "jpeg": Corruption(compress, (30, 15, 7), "quality of 100"),
    "contrast": Corruption(fade, (0.5, 0.3, 0.15), "share of the contrast that is left"),
    "occlusion": Corruption(occlude, (0.1, 0.25, 0.5), "share of the area"),
    "shuffled patches": Corruption(shuffle_patches, (2, 4, 8), "pieces a side"),
}
LEVELS = ("mild", "medium", "strong")


def measure_corruptions(
    logits_of: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    groups: NDArray[np.int64] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Accuracy on images as they are and made worse.

    Args:
        logits_of: from images, uint8 (B, C, H, W) and not normalised, to logits (B, K).
        batches: such images and their labels (B,), each once.
        groups: (N,): which images show one thing, so that intervals are of whole groups; None where nothing says so.
        progress: called with how many images are done.

    Returns:
        `images`, how many; `top1` as they are; `top1_mean`, the mean over all kinds and levels; `corruptions`: of each
        kind its `unit` and `levels`, with `level`, `severity`, `top1` and its `ci95`, and `lost`, by how much that is
        below `top1` (`mean`, `ci95`: Tango's interval, paired over images; None where images have groups).
    """
    kinds = [(name, severity) for name, kind in CORRUPTIONS.items() for severity in kind.severities]
    numbers, as_is = count(), []
    worse: dict[tuple[str, float], list[Tensor]] = {kind: [] for kind in kinds}
    done = 0
    for images, labels in batches:
        seeds = [next(numbers) for _ in images]
        as_is.append(logits_of(images).argmax(1) == labels)
        for kind in kinds:
            worse[kind].append(logits_of(corrupted(images, *kind, seeds)).argmax(1) == labels)
        done += len(images)
        progress(done)
    right = torch.cat(as_is)
    levels = {kind: level_of(right, torch.cat(found), groups) for kind, found in worse.items()}
    found = {
        name: {
            "unit": kind.unit,
            "levels": [
                {"level": level, "severity": severity} | levels[name, severity]
                for level, severity in zip(LEVELS, kind.severities, strict=True)
            ],
        }
        for name, kind in CORRUPTIONS.items()
    }
    mean = fmean(level["top1"] for level in levels.values())
    return {"images": len(right), "top1": share_of(right), "top1_mean": mean, "corruptions": found}


def corrupted(images: Tensor, name: str, severity: float, seeds: Iterable[int]) -> Tensor:
    """Images, uint8 (B, C, H, W), made worse, each by chance of its own seed."""
    change = CORRUPTIONS[name].change
    seeded = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([change(image, severity, random) for image, random in zip(images, seeded, strict=True)])


def level_of(right: Tensor, worse: Tensor, groups: NDArray[np.int64] | None) -> dict[str, Any]:
    """What is right of worse images, and what is lost against the images as they are, each bool (N,)."""
    lost = tango_interval(right.int() - worse.int()) if groups is None else None
    lost = lost or {"mean": share_of(right) - share_of(worse), "ci95": None}
    return {"top1": share_of(worse), "ci95": list(share_interval(worse.numpy(), groups)), "lost": lost}


def share_of(right: Tensor) -> float:
    return float(right.double().mean())


def corruption_table(found: Mapping[str, Any]) -> list[list[str]]:
    """Accuracy by kind and level, headings first."""
    rows = [
        [name, *(f"{level['top1']:.2%}" for level in kind["levels"]), in_points(kind["levels"][-1]["lost"])]
        for name, kind in found["corruptions"].items()
    ]
    return [["images made worse", *LEVELS, "lost when strong, points"], *rows]


def in_points(lost: Mapping[str, Any]) -> str:
    """A difference of shares in percentage points, with its interval where there is one."""
    points = f"{100 * lost['mean']:.1f}"
    return f"{points} ({' to '.join(f'{100 * end:.1f}' for end in lost['ci95'])})" if lost["ci95"] else points
