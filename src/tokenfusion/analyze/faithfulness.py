"""Whether a map says where a model looks: deletion and insertion curves (RISE; Petsiuk et al., arXiv 1806.07421).

Deletion takes the most important pixels away first: a faithful map makes the class's probability fall early, and the
area under its curve is small. Insertion puts them into a blurred image: the area is large.

Letters: B batch, S steps, H W pixels, h w grid.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from tokenfusion.intervals import mean_interval

STEPS = 16
"""Steps between the whole image and none of it."""
LOOKS = 3 * 2 * (STEPS + 1)
"""How often the model looks at an image for each of its maps: by three orders, for both curves."""
BLUR = 5 / 224
"""Standard deviation of the blur, as a share of the image's longer side; the paper's code has 5 pixels of 224."""
Probability = Callable[[Tensor], Tensor]
"""From images (B, in_chans, H, W) to the probability of each one's class, (B,)."""


def importance(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, h, w) as large as the images: (B, H, W)."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def curve(probability: Probability, whole: Tensor, base: Tensor, order: Tensor, steps: int = STEPS) -> Tensor:
    """Probability while the pixels of one image replace those of another, the most important first.

    Args:
        probability: of each image's class.
        whole, base: (B, in_chans, H, W): what is replaced, and by what.
        order: importance of the pixels (B, H, W).
        steps: equal shares that are replaced one after the other.

    Returns:
        (B, steps + 1), the first of them of `whole`.
    """
    ranks = order.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).view_as(order)
    pixels = ranks[0].numel()
    points = []
    for step in range(steps + 1):
        taken = (ranks < pixels * step / steps)[:, None].to(whole.device)
        points.append(probability(torch.where(taken, base, whole)).float().cpu())
    return torch.stack(points, dim=1)


def area(curves: Tensor) -> Tensor:
    """Area under curves (B, S + 1) over shares from 0 to 1, by trapezoids: (B,)."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


def blurred(images: Tensor) -> Tensor:
    """Images (B, in_chans, H, W) with little but their colours left."""
    sigma = max(1.0, BLUR * max(images.shape[2:]))
    return gaussian_blur(images, [2 * round(2 * sigma) + 1] * 2, [sigma] * 2)


def areas(probability: Probability, images: Tensor, order: Tensor) -> dict[str, Tensor]:
    """Areas under the deletion curve (to the mean colour, 0) and the insertion curve (from blur), (B,) each."""
    return {
        "deletion": area(curve(probability, images, torch.zeros_like(images), order)),
        "insertion": area(curve(probability, blurred(images), images, order)),
    }


def baselines(maps: Tensor, size: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Orders that know nothing of the image, (B, H, W) each: noise on the maps' own grid, and the centre first."""
    rows, columns = (torch.linspace(-1, 1, side) for side in size)
    centre = -(rows[:, None].square() + columns[None].square())
    noise = torch.rand(maps.shape, generator=generator)
    return {"random": importance(noise, size), "centre": centre.expand(len(maps), -1, -1)}


def measure_faithfulness(batches: Iterable[tuple[Tensor, dict[str, Tensor], Probability]]) -> dict[str, Any]:
    """Areas under both curves of each branch's map, and how they differ from those of the baselines.

    Args:
        batches: images (B, in_chans, H, W) as the model takes them, their maps (B, h, w) by branch, and the probability
            of the class that those explain.

    Returns:
        by branch: `deletion` and `insertion`, each with the means of `map`, `random` and `centre` over images, and of
        the paired differences `map_minus_random` and `map_minus_centre`, with 95 % intervals.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[tuple[str, str, str], list[Tensor]] = {}
    for images, maps, probability in batches:
        size = (images.shape[2], images.shape[3])
        for branch, saliency_map in maps.items():
            orders = {"map": importance(saliency_map, size)} | baselines(saliency_map, size, generator)
            for kind, order in orders.items():
                for way, under in areas(probability, images, order).items():
                    found.setdefault((branch, way, kind), []).append(under)
    values = {key: torch.cat(parts) for key, parts in found.items()}
    result: dict[str, Any] = {}
    for (branch, way, kind), areas_of in values.items():
        entry = result.setdefault(branch, {}).setdefault(way, {})
        entry[kind] = mean_interval(areas_of)
        if kind != "map":
            entry[f"map_minus_{kind}"] = mean_interval(values[branch, way, "map"] - areas_of)
    return result
