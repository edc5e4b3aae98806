"""What scores and labels say about a classifier of images with any number of classes: AP, F1, exact match.

Pure numbers: nothing here reads or writes a file. scikit-learn draws the precision-recall curves that thresholds are
chosen from. Average precision is computed here, because an interval needs it for a thousand resamples, for which
scikit-learn would sort the scores anew; a test holds the two equal.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tokenfusion.metrics import RESAMPLES, class_scores, require_finite_logits, share_interval, wilson_interval

CHUNK = 4_000_000
"""Resamples × images that are in memory at once."""

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


def average_precision(scores: Floats, labels: Bools, counts: NDArray[np.int64]) -> Floats:
    """The area under a class's steps of precision and recall, for each of several samples of the images.

    Args:
        scores: (N,); only their order matters, and equal ones are one step.
        labels: (N,): which images have the class.
        counts: (S, N): how often each image is in each sample.

    Returns:
        (S,) in [0, 1]; NaN where no image of a sample has the class.

    Source: sum of (R_n - R_{n-1}) P_n over the steps, as `sklearn.metrics.average_precision_score`.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # the last image of each step
    taken = counts[:, order].cumsum(1)[:, ends]
    found = (counts[:, order] * labels[order]).cumsum(1)[:, ends]
    gained = np.diff(found, axis=1, prepend=0)
    with np.errstate(invalid="ignore"):
        return (gained * found / np.maximum(taken, 1)).sum(1) / found[:, -1]


def average_precisions(scores: Floats, labels: Bools) -> Floats:
    """(K,) average precision of each class, of scores and labels (N, K); NaN for a class that no image has."""
    once = np.ones((1, len(labels)), dtype=np.int64)
    return np.array([average_precision(*columns, once)[0] for columns in zip(scores.T, labels.T, strict=True)])


def mean_average_precision(scores: Floats, labels: Bools) -> float | None:
    """mAP: the mean of the average precisions of the classes that some image has; None where there is none."""
    return mean_of(average_precisions(scores, labels))


def mean_of(values: Floats) -> float | None:
    """The mean of what is not NaN; None where nothing is left."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None


def bootstrap_map(scores: Floats, labels: Bools, groups: NDArray[np.int64] | None = None) -> list[float] | None:
    """The 95 % interval of the mAP over images, or where there are groups (N,) whole groups, drawn anew with
    replacement: [low, high].

    None where no image has a class. A class that a resample has no image of is left out of that resample's mean. Where
    all resamples agree, as they do when every ranking is perfect, it is Wilson's interval of that share of the images.

    Source: Efron, Better Bootstrap Confidence Intervals, 1987: the percentile interval.
    """
    if not labels.any():
        return None
    random = np.random.default_rng(0)
    numbers = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    units = int(numbers.max()) + 1
    means = []
    at_once = max(CHUNK // len(labels), 1)
    for start in range(0, RESAMPLES, at_once):
        drawn_units = random.multinomial(units, np.full(units, 1 / units), size=min(at_once, RESAMPLES - start))
        counts = drawn_units[:, numbers]
        rows = np.stack([average_precision(s, y, counts) for s, y in zip(scores.T, labels.T, strict=True) if y.any()])
        drawn = ~np.isnan(rows)
        means.append(np.where(drawn, rows, 0).sum(0) / np.maximum(drawn.sum(0), 1))
    low, high = (float(end) for end in np.quantile(np.concatenate(means), [0.025, 0.975]))
    if high - low < 1e-12:
        low, high = wilson_interval(int(low * units), units)[0], wilson_interval(math.ceil(high * units), units)[1]
    return [low, high]


def tune_thresholds(scores: Floats, labels: Bools) -> Floats:
    """The score from which an image is given a class, for each class: where F1 is largest.

    It is put midway between the scores on its two sides; of several that are as good, it is the highest. A class that
    no image has keeps 0.5.

    Args:
        scores: (N, K) in [0, 1].
        labels: bool (N, K).

    Returns:
        (K,) in [0, 1].

    Source: Lipton et al., Thresholding Classifiers to Maximize F1 Score, arXiv 1402.1892.
    """
    from sklearn.metrics import precision_recall_curve

    thresholds = np.full(labels.shape[1], 0.5)
    for k in np.flatnonzero(labels.any(0)):
        precision, recall, steps = precision_recall_curve(labels[:, k], scores[:, k])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = len(steps) - 1 - f1[:-1][::-1].argmax()
        below = steps[best - 1] if best else 0.0
        thresholds[k] = (float(steps[best]) + float(below)) / 2
    return thresholds


def cross_fitted(scores: Floats, labels: Bools, fold: NDArray[np.int64]) -> Bools:
    """Predictions (N, K) in which each image is judged by thresholds that were tuned on the other fold.

    Thresholds that were tuned on the images which they judge would flatter.

    Args:
        scores, labels: (N, K).
        fold: (N,) of 0 and 1.
    """
    predictions = np.zeros_like(labels)
    for own in (0, 1):
        thresholds = tune_thresholds(scores[fold != own], labels[fold != own])
        predictions[fold == own] = scores[fold == own] >= thresholds
    return predictions


def sigmoid_scores(logits: Tensor) -> Floats:
    """Probabilities (N, K) of logits (N, K), in float64.

    Raises:
        InputError: a logit is not finite.
    """
    require_finite_logits(logits)
    return logits.double().sigmoid().numpy()


def image_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) binary cross-entropy of each image, the mean over its classes, natural logarithm."""
    return F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none").mean(1)


def evaluate_multilabel(
    logits: Tensor,
    labels: Tensor,
    predictions: Bools,
    classes: Sequence[str],
    thresholds: Sequence[float],
    skipped: int = 0,
    groups: NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    """Judge a classifier by its logits on images with any number of classes.

    Args:
        logits: (N, K) floats.
        labels: bool (N, K).
        predictions: (N, K), as `cross_fitted` or thresholds make them.
        classes: K different names.
        thresholds: K scores, passed on.
        skipped: images that could not be read; passed on, and counted in nothing else.
        groups: (N,): which images show one thing, so that intervals are of whole groups; None where nothing says so.

    Returns:
        Values that JSON can hold, never NaN; shares are in [0, 1], and None where they are of nothing.
        `n`: images; `groups`: of them, or None. `map`: mean average precision of the classes that some image has.
        `map_ci95`: [low, high], bootstrap over the images or groups. `loss`: binary cross-entropy, mean over images and
        classes. `f1_macro`: mean of the classes that some image has; `f1_micro`: of all decisions together.
        `exact_match`: share of images all of whose classes are right; `exact_match_ci95`: see `share_interval`.
        `per_class`: {name: {ap, f1, precision, recall, threshold, n}}, n images that have it. `skipped`.
    """
    logits, truth = logits.double(), labels.numpy()
    ap = average_precisions(logits.numpy(), truth)  # of sigmoids, those near 1 would be equal
    tables = (truth & predictions, truth, predictions)
    counts = (table.sum(0).tolist() for table in tables)  # right, images, predicted
    per_class = {
        name: {"ap": None if np.isnan(one) else float(one), "threshold": float(threshold)} | class_scores(*row)
        for name, one, threshold, *row in zip(classes, ap, thresholds, *counts, strict=True)
    }
    exact = (predictions == truth).all(1)
    return {
        "n": len(labels),
        "groups": None if groups is None else len(np.unique(groups)),
        "map": mean_of(ap),
        "map_ci95": bootstrap_map(logits.numpy(), truth, groups),
        "loss": image_losses(logits, labels).mean().item(),
        "f1_macro": mean_of(np.array([row["f1"] for row in per_class.values() if row["n"]], dtype=np.float64)),
        "f1_micro": class_scores(*(int(table.sum()) for table in tables))["f1"],
        "exact_match": int(exact.sum()) / len(labels),
        "exact_match_ci95": list(share_interval(exact, groups)),
        "per_class": per_class,
        "skipped": skipped,
    }
