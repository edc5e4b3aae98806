"""What resizing and cropping to the model's input cuts off."""

from typing import Any

import numpy as np

from tokenfusion.check.inspection import Inspection

MANY = 0.4
"""Share of an image's area, below which so little is kept that the image is named."""


def kept(height: int, width: int, img_size: tuple[int, int], crop_pct: float) -> tuple[float, float]:
    """Shares of an image's height and width that evaluation sees: `data.preprocess.cover` in numbers."""
    scale = max(side / crop_pct / now for side, now in zip(img_size, (height, width), strict=True))
    return img_size[0] / scale / height, img_size[1] / scale / width


def measure_crop(
    names: list[str], inspections: list[Inspection], img_size: tuple[int, int], crop_pct: float
) -> dict[str, Any]:
    """Which share of the images the centre crop keeps, and the images of which it keeps least."""
    boxes = [
        (name, *kept(image.height, image.width, img_size, crop_pct))
        for name, image in zip(names, inspections, strict=True)
        if not image.reason
    ]
    boxes.sort(key=lambda box: box[1] * box[2])
    return {
        "img_size": list(img_size),
        "crop_pct": round(crop_pct, 4),
        "median_kept": round(float(np.median([h * w for _, h, w in boxes])), 4) if boxes else None,
        "least_kept": [
            {"path": name, "height": round(h, 4), "width": round(w, 4)} for name, h, w in boxes if h * w < MANY
        ],
    }
