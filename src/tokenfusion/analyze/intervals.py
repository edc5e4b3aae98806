"""Means over images, with their intervals."""

from typing import Any

from torch import Tensor


def mean_interval(values: Tensor) -> dict[str, Any]:
    """The mean of a value per image (N,), and its 95 % interval by Student's t; `ci95` is None of a single image.

    Of differences between two treatments of the same images, the interval is the paired one.
    """
    from scipy.stats import t

    values = values.double()
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return {"mean": mean, "ci95": None}
    half = float(t.ppf(0.975, count - 1) * values.std() / count**0.5)
    return {"mean": mean, "ci95": [mean - half, mean + half]}
