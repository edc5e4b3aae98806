"""Means over images, with their intervals."""

from math import inf, sqrt
from statistics import NormalDist, fmean
from typing import Any

from torch import Tensor

from tokenfusion.metrics import t_interval


def mean_interval(values: Tensor) -> dict[str, Any]:
    """The mean of a value per image (N,), and its 95 % interval by Student's t; `ci95` is None of a single image.

    Of differences between two treatments of the same images, the interval is the paired one.
    """
    numbers = values.tolist()
    interval = t_interval(numbers)
    return {"mean": fmean(numbers), "ci95": interval and list(interval)}


def tango_interval(flips: Tensor) -> dict[str, Any]:
    """The mean of values -1, 0 and 1 (N,), the change of a share between two treatments of the same images.

    Its 95 % interval is Tango's (Statistics in Medicine 17, 1998): where the score test does not reject. Without a flip
    it is Wilson's interval of none among N to either side, while Student's t would have no width.
    """
    from scipy.optimize import brentq

    count, gained, lost = len(flips), int((flips > 0).sum()), int((flips < 0).sum())
    mean, z, edge = (gained - lost) / count, NormalDist().inv_cdf(0.975), 1 - 1e-12

    def end(sign: int) -> float:
        def excess(change: float) -> float:
            return z - sign * tango_statistic(change, gained, lost, count)

        return float(sign) if sign * mean == 1 else float(brentq(excess, mean, sign * edge))

    return {"mean": mean, "ci95": [end(-1), end(1)]}


def tango_statistic(change: float, gained: int, lost: int, count: int) -> float:
    """Tango's statistic of how far below a `change` what was seen lies, in standard errors if that were the change."""
    a, c = 2 * count, -lost * change * (1 - change)
    b = -gained - lost + (2 * count - gained + lost) * change
    likely = (sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # share of images lost, likeliest under the change
    variance = count * (2 * likely + change * (1 - change))
    difference = count * change - (gained - lost)
    return difference / sqrt(variance) if variance > 0 else inf * difference if difference else 0.0
