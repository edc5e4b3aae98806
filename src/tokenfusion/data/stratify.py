"""Hold out images that have several labels each, so that every class is held out in about the same share."""

import numpy as np


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw the images to hold out by iterative stratification, the rarest class first.

    A class with two images or more is held out at least once unless its images are all needed on one side by rarer
    classes; every class that has an image keeps one to train on. The number held out may differ by a few from
    fraction × N.

    Args:
        labels: bool (N, K): whether an image has each class; N is 2 or more.
        fraction: share of each class that is held out, in (0, 1).
        seed: decides which.

    Returns:
        int64 (n,): indices of the held-out images, ascending.

    Source: Sechidis et al., On the Stratification of Multi-Label Data, 2011, algorithm 1, with two parts.
    """
    random = np.random.default_rng(seed)
    # images without any class are a class of their own here
    labels = np.column_stack([labels, ~labels.any(1)])
    counts = labels.sum(0)
    wanted = np.clip(counts * fraction, np.minimum(1, counts // 2), np.maximum(counts - 1, 0))
    wanted = np.stack([counts - wanted, wanted])  # (2, K + 1) of training and held-out images still to place
    room = len(labels) * np.array([1 - fraction, fraction])
    side = np.full(len(labels), -1)
    left = counts.copy()
    while left.any():
        rarest = np.where(left > 0, left, len(labels) + 1).argmin()
        for image in random.permutation(np.flatnonzero(labels[:, rarest] & (side < 0))):
            needs = [(wanted[part, rarest], room[part]) for part in (0, 1)]
            side[image] = part = int(needs[1] > needs[0])
            wanted[part, labels[image]] -= 1
            room[part] -= 1
            left -= labels[image]
    for label in np.flatnonzero(counts):
        if not (side[labels[:, label]] == 0).any():
            side[np.flatnonzero(labels[:, label])[0]] = 0
    return np.flatnonzero(side == 1)
