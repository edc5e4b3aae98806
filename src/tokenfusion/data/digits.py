"""Scikit-learn's 1,797 handwritten digits of 8×8 pixels: real scans that ship in its wheel."""

import numpy as np

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.readers import as_pixels


def open_digits() -> Dataset:
    """The digits, which name no split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    values = np.round(digits.images * (255 / 16)).astype(np.uint8)  # scanned in 17 steps, 0 to 16
    return Dataset(
        where="digits",
        names=[f"digits:{index}" for index in range(len(values))],
        labels=digits.target.astype(np.int64),
        classes=tuple(str(name) for name in digits.target_names),
        splits=[""] * len(values),
        reader=as_pixels(bytearray(values.repeat(3).tobytes()), [values.shape[1:]] * len(values)),
    )
