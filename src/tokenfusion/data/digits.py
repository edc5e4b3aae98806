"""Scikit-learn's handwritten digits."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decode import UnreadableImage


@dataclass(eq=False, kw_only=True)
class Digits(Dataset):
    """Scikit-learn's 1,797 handwritten digits of 8×8 pixels: real scans that ship in its wheel."""

    pixels: Tensor
    """uint8 (N, 8, 8)."""

    def decode(self, index: int, max_pixels: int) -> Tensor:
        height, width = self.pixels.shape[1:]
        if height * width > max_pixels:
            raise UnreadableImage(f"{width}×{height} pixels are more than max_pixels={max_pixels}; raise the limit")
        return self.pixels[index].expand(3, -1, -1)


def open_digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    values = np.round(digits.images * (255 / 16)).astype(np.uint8)  # scanned in 17 steps, 0 to 16
    return Digits(
        where="digits",
        classes=tuple(str(name) for name in digits.target_names),
        names=[f"digits:{index}" for index in range(len(values))],
        labels=digits.target.astype(np.int64),
        splits=[""] * len(values),
        pixels=torch.from_numpy(values),
    )
