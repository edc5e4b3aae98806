"""Labels that quick classifiers dispute.

Each classifier is a logistic regression on oriented gradients and coarse colours of thumbnails, or on what pretrained
parents see (`seen.py`), and each image is judged by one that has not seen it (5-fold cross-validation). A label is
disputed where it is likelier wrong than right (`noise.py`); and also where one in four such labels is wrong, as long as
three quarters of all disputes are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from tokenfusion.check.duplicates import gray
from tokenfusion.check.lucas_kanade import slopes
from tokenfusion.check.noise import find_wrong_labels
from tokenfusion.probe import FOLDS, regressions

MAX_JUDGED = 20_000
"""Most images whose labels are judged, an even sample of all."""
LEAST, PRECISION = 0.25, 0.75
"""Probability that a label is wrong from which on it is disputed, though likelier right, as long as such a share of the
disputes is wrong: of 500 flips among 10,000 images of CIFAR-10 that found 40 more, among 130 more disputes."""
MIN_IMAGES = 10
"""Least images of a class whose labels are judged."""
ABSENT = -30.0
ORIENTATIONS = 8
TOO_FEW = f"fewer than two classes have {MIN_IMAGES} images, and {FOLDS} readable ones among those that are judged"


class Dispute(NamedTuple):
    """A label that is likely wrong."""

    image: int
    suggestion: int
    """The likeliest other class."""
    score: float
    """Its probability."""
    label_score: float
    """The label's probability."""
    wrong: float
    """Probability that the label is wrong, at most about: an odd picture is taken for a wrong label."""
    precision: float
    """Share of the disputes up to this one that are right ones, as `wrong` has it, at most about too."""


class Judgement(NamedTuple):
    """What the classifiers found."""

    disputes: list[Dispute]
    """The likeliest wrong label first."""
    judged: int
    """How many images."""
    accuracy: float | None
    """Share of the labels that the classifiers guess right; None where nothing could be judged."""
    share: float | None = None
    """Estimated share of the labels that are wrong, odd pictures among them."""
    note: str = ""
    """Why labels were not judged."""


def choose_judged(labels: np.ndarray) -> np.ndarray:
    """Indices of the images whose labels are judged, int64 ascending; none of multi-label data.

    Args:
        labels: int64 (N,), or bool (N, K) of multi-label data.
    """
    if labels.ndim == 2:
        return np.empty(0, dtype=np.int64)
    chosen = np.flatnonzero(np.bincount(labels)[labels] >= MIN_IMAGES)
    if len(chosen) <= MAX_JUDGED:
        return chosen
    return chosen[np.linspace(0, len(chosen) - 1, MAX_JUDGED).astype(int)]


def judge_labels(
    features: Sequence[np.ndarray], labels: np.ndarray, indices: np.ndarray, groups: np.ndarray | None, c: float
) -> Judgement:
    """Cross-validate a quick classifier on each kind of features, and find the labels that are likely wrong.

    Args:
        features: of each classifier, float (N, F), such as `features_of` thumbnails.
        labels: int64 (N,).
        indices: int64 (N,), by which a Dispute names each image.
        groups: int64 (N,); images of one are judged by a classifier that has seen none of them.
        c: inverse strength of the classifiers' penalty.
    """
    apart = np.arange(len(labels)) if groups is None else groups
    pairs = np.unique(np.stack([labels, apart]), axis=1)[0] if len(labels) else labels  # each group of a class once
    chosen = np.flatnonzero(np.bincount(pairs)[labels] >= FOLDS)
    known = np.unique(labels[chosen])
    if len(known) < 2:
        return Judgement([], 0, None, note=TOO_FEW)
    given = np.searchsorted(known, labels[chosen])
    folds = judging_folds(given, None if groups is None else groups[chosen])
    found = find_wrong_labels([cross_validated(some[chosen], given, folds, c) for some in features], given)
    order = np.argsort(-found.wrong, kind="stable")
    precision = np.cumsum(found.wrong[order]) / np.arange(1, len(order) + 1)
    likely = found.wrong[order]
    order = order[(likely >= 0.5) | ((likely >= LEAST) & (precision >= PRECISION))]
    others = found.scores.copy()
    others[np.arange(len(given)), given] = -1
    disputes = [
        Dispute(
            int(indices[chosen[i]]),
            int(known[other := others[i].argmax()]),
            float(found.scores[i, other]),
            float(found.scores[i, given[i]]),
            float(found.wrong[i]),
            float(share),
        )
        for i, share in zip(order, precision, strict=False)
    ]
    return Judgement(disputes, len(chosen), float((found.scores.argmax(1) == given).mean()), found.share)


def judging_folds(labels: np.ndarray, groups: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images to fit on and to judge, (n,) each, of every fold; each class in all of them, each group in one."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    return list(kind(FOLDS, shuffle=True, random_state=0).split(labels, labels, groups))


def cross_validated(
    features: np.ndarray, labels: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray]], c: float
) -> np.ndarray:
    """Logits (N, K), of each image by a classifier fitted without its fold; ABSENT of classes that this has not met."""
    logits = np.full((len(labels), int(labels.max()) + 1), ABSENT)
    for fitted, judged in folds:
        mean, std = features[fitted].mean(0), features[fitted].std(0)
        scale = np.where(std > 1e-6, 1 / std.clip(1e-6), 0)
        (line,) = regressions((features[fitted] - mean) * scale, labels[fitted], (c,))
        logits[np.ix_(judged, np.unique(labels[fitted]))] = line((features[judged] - mean) * scale)
    return logits


def thumbnail_features(thumbnails: Tensor) -> np.ndarray:
    """As `features_of`, some at a time."""
    return np.concatenate([features_of(part).numpy() for part in torch.split(thumbnails, 512)])


def features_of(thumbnails: Tensor) -> Tensor:
    """Histograms of oriented gradients (Dalal and Triggs, CVPR 2005) and coarse colours, float (B, 471) at S = 48."""
    along_x, along_y = slopes(gray(thumbnails))
    strength = (along_x.square() + along_y.square()).sqrt()
    angle = torch.atan2(along_y, along_x) % torch.pi / torch.pi * ORIENTATIONS
    bins = torch.arange(ORIENTATIONS).view(1, -1, 1, 1)
    distance = (angle - bins).abs()
    votes = (1 - torch.minimum(distance, ORIENTATIONS - distance)).clamp(min=0) * strength
    size = thumbnails.shape[-1] // 6
    cells = avg_pool2d(votes, size)
    cells = (cells / (cells.square().sum(1, keepdim=True).sqrt() + 10)).sqrt()
    wide = avg_pool2d(votes, 2 * size)
    wide = (wide / (wide.sum(1, keepdim=True) + 10)).sqrt()
    colours = avg_pool2d(thumbnails.float() / 255, size)
    return torch.cat([cells.flatten(1), wide.flatten(1), colours.flatten(1), colours.flatten(2).std(2)], 1)
