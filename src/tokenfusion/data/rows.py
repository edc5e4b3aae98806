"""What rows of lists and of Parquet say beside image and label: weights and groups."""

import math

import numpy as np

from tokenfusion.errors import InputError


def as_groups(groups: list[str]) -> np.ndarray | None:
    """int64 (N,), or None where no image has a group; an image without one is a group of its own."""
    if not any(groups):
        return None
    alone = [group or f"\0{index}" for index, group in enumerate(groups)]
    return np.unique(alone, return_inverse=True)[1].astype(np.int64)


def as_weights(where: str, names: list[str], weights: list[float | None]) -> np.ndarray | None:
    """float64 (N,), or None where no image has a weight; refuses a list in which only some have one."""
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        name = names[weights.index(None)]
        raise InputError(f"{where}: {name!r} has no weight while others have one; give one to all images or to none")
    return np.array(given) if given else None


def read_weight(value: object, where: str) -> float | None:
    """A row's `weight`; None where it has none."""
    if value is None or value == "":
        return None
    try:
        weight = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(
            f"{where}: weight={value!r} is no weight; give a finite number above 0, or leave the image out"
        )
    return weight
