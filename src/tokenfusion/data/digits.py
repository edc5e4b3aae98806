"""Scikit-learn's 1,797 handwritten digits of 8×8 pixels: real scans that ship in its wheel."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.readers import as_pixels


def open_digits() -> Dataset:
    """The digits, which name no split; their file is read without scikit-learn, whose import takes seconds."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    table = np.loadtxt(Path(package.origin).with_name("datasets") / "data" / "digits.csv.gz", delimiter=",")
    values = np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # scanned in 17 steps, 0 to 16
    return Dataset(
        where="digits",
        names=[f"digits:{index}" for index in range(len(values))],
        labels=table[:, -1].astype(np.int64),
        classes=tuple("0123456789"),
        splits=[""] * len(values),
        reader=as_pixels(bytearray(values.repeat(3).tobytes()), [values.shape[1:]] * len(values)),
    )
