"""What resizing and cropping to the model's input cuts off."""

from typing import Any

import numpy as np

from tokenfusion.check.look import Look

MANY = 0.4
"""Share of an image's area, below which so little is kept that the image is named."""


def kept(height: int, width: int, img_size: tuple[int, int], crop_pct: float) -> tuple[float, float]:
    """Shares of an image's height and width that evaluation sees: `data.preprocess.cover` in numbers."""
    scale = max(side / crop_pct / now for side, now in zip(img_size, (height, width), strict=True))
    return img_size[0] / scale / height, img_size[1] / scale / width


def describe_crop(names: list[str], looks: list[Look], img_size: tuple[int, int], crop_pct: float) -> dict[str, Any]:
    """Which share of the images the centre crop keeps, and the images of which it keeps least."""
    boxes = {
        name: kept(look.height, look.width, img_size, crop_pct)
        for name, look in zip(names, looks, strict=True)
        if not look.reason
    }
    areas = np.array([height * width for height, width in boxes.values()])
    least = sorted(boxes, key=lambda name: boxes[name][0] * boxes[name][1])
    cut = [name for name in least if boxes[name][0] * boxes[name][1] < MANY]
    return {
        "img_size": list(img_size),
        "crop_pct": round(crop_pct, 4),
        "median_kept": round(float(np.median(areas)), 4) if len(areas) else None,
        "least_kept": [
            {"path": name, "height": round(boxes[name][0], 4), "width": round(boxes[name][1], 4)} for name in cut
        ],
    }
