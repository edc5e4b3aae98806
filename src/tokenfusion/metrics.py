"""What logits and labels say about a classifier: accuracy with its interval, per class, confusion, calibration.

Pure numbers: nothing here reads or writes a file. They are computed here, because torchmetrics gives 0 where a class
has no images, leaves ties in top-5 to chance, puts confidences of exactly 1 into a bin of their own, and takes seconds
to import; the tests hold the rest against it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tokenfusion.errors import InputError

TEMPERATURE_BOUNDS = (0.05, 20.0)
"""Temperatures that are searched. Without a lower bound a classifier that is always right would be driven to 0."""

RESAMPLES = 1000
"""Of the bootstrap over groups."""
CHUNK = 8192
"""Rows whose losses are computed in float64 at a time, so that memory does not grow with the data set."""


@dataclass(frozen=True)
class Bins:
    """A reliability diagram: images sorted by confidence into bins of equal width."""

    edges: NDArray[np.float64]
    """(bins + 1,) from 0 to 1; a bin holds its left edge, and the last one also 1."""
    count: NDArray[np.int64]
    """(bins,) images."""
    confidence: NDArray[np.float64]
    """(bins,) mean confidence; 0 where the bin is empty."""
    accuracy: NDArray[np.float64]
    """(bins,) share that is correct; 0 where the bin is empty."""

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean gap between confidence and accuracy, each bin weighed by its images.

        Source: Guo et al., On Calibration of Modern Neural Networks, 2017, equation 5.
        """
        return float((self.count * abs(self.accuracy - self.confidence)).sum() / max(self.count.sum(), 1))


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> Bins:
    """Sort predictions by confidence into bins of equal width.

    Args:
        confidence: (N,) probabilities of the predicted classes, in [0, 1].
        correct: (N,) whether each prediction is right.
        bins: how many bins.

    Returns:
        The bins; all empty when N is 0.
    """
    # float32 softmax may exceed 1 by a rounding error, which np.histogram would drop
    confidence = np.clip(np.asarray(confidence, dtype=np.float64), 0, 1)
    count, edges = np.histogram(confidence, bins, range=(0, 1))
    totals = (
        np.histogram(confidence, bins, range=(0, 1), weights=np.asarray(weights, dtype=np.float64))[0]
        for weights in (confidence, correct)
    )
    return Bins(edges, count, *(total / np.maximum(count, 1) for total in totals))


def bootstrap_ece(
    confidence: ArrayLike,
    correct: ArrayLike,
    groups: NDArray[np.int64] | None = None,
    resamples: int = 200,
) -> list[float]:
    """The 95 % interval of the expected calibration error over images drawn anew with replacement: [low, high].

    Resampling adds to the gaps as sampling did, so that the percentiles are mirrored at the error that was found, which
    the interval holds even where that makes all of them larger. Where
    all images are right, or all wrong, images drawn anew are too: then the interval reaches to the gaps between mean
    confidence and the ends of Wilson's interval of the accuracy.

    Args:
        confidence, correct: as in `reliability`.
        groups: (N,), of images that show one thing: whole groups are drawn.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.4: the basic interval.
    """
    random, found = np.random.default_rng(0), reliability(confidence, correct).ece
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct)
    members = members_of(groups, len(correct))
    drawn = (random.integers(0, len(members), len(members)) for _ in range(resamples))
    rows = (chosen if groups is None else np.concatenate([members[group] for group in chosen]) for chosen in drawn)
    errors = [reliability(confidence[some], correct[some]).ece for some in rows]
    lower, upper = (float(end) for end in np.quantile(errors, [0.025, 0.975]))
    low, high = min(max(2 * found - upper, 0.0), found), max(2 * found - lower, found)
    if correct.all() or not correct.any():
        mean, ends = float(confidence.mean()), share_interval(correct, groups)
        low = min(low, max(ends[0] - mean, mean - ends[1], 0.0))
        high = max(high, *(abs(end - mean) for end in ends))
    return [low, high]


def members_of(groups: NDArray[np.int64] | None, images: int) -> Sequence[Any]:
    """The indices of each group's images, int64; of images without groups the images themselves."""
    if groups is None:
        return range(images)
    _, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return np.split(np.argsort(numbers, kind="stable"), np.cumsum(sizes)[:-1])


def share_interval(right: ArrayLike, groups: NDArray[np.int64] | None = None) -> tuple[float, float]:
    """The 95 % interval of the share of images that are right.

    Images of one group, such as a patient's, are right or wrong together: whole groups are drawn anew with
    replacement (cluster bootstrap, percentiles). Where all images are alike, resampling tells nothing, and the interval
    is Wilson's of so many groups; without groups it is Wilson's of the images.

    Args:
        right: bool (N,).
        groups: (N,), or None.

    Returns:
        (low, high) in [0, 1].

    Source: Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.
    """
    right = np.asarray(right, dtype=bool)
    if groups is None:
        return wilson_interval(int(right.sum()), len(right))
    numbers = np.unique(groups, return_inverse=True)[1]
    sizes, rights = np.bincount(numbers), np.bincount(numbers, weights=right)
    if right.all() or not right.any():
        return wilson_interval(len(sizes) * int(right.all()), len(sizes))
    random = np.random.default_rng(0)
    shares = []
    for _ in range(RESAMPLES):
        counts = np.bincount(random.integers(0, len(sizes), len(sizes)), minlength=len(sizes))
        shares.append(counts @ rights / (counts @ sizes))
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean by Student's t; None of fewer than two values."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share.

    Args:
        successes: how many of `n` succeeded.
        n: how many were tried; with 0, nothing is known and the interval is (0, 1).

    Returns:
        (low, high) in [0, 1].

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} is not between 0 and n={n}; give a count of the n that succeeded")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.975)
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # at 0 and n the ends are exact, whatever the rounding
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def negative_log_likelihood(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Mean cross-entropy of logits / temperature, natural logarithm.

    Args:
        logits: (N, K) floats.
        labels: (N,) classes.
        temperature: above 0.
    """
    chunks = [slice(start, start + CHUNK) for start in range(0, len(labels), CHUNK)]
    losses = [F.cross_entropy(logits[c].double() / temperature, labels[c], reduction="sum") for c in chunks]
    return sum(loss.item() for loss in losses) / len(labels)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature, within TEMPERATURE_BOUNDS, that minimises the cross-entropy of logits / temperature.

    The loss has one minimum in the temperature, so that a bounded search finds it, or else ends at a bound: near 0.05
    when every image is right (sharper is always better), near 20 when guessing would do better. It is 1 where no
    temperature beats 1, as when all logits are equal.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, section 4.2.
    """
    return minimise_over_temperatures(lambda temperature: negative_log_likelihood(logits, labels, temperature))


def minimise_over_temperatures(loss: Callable[[float], float]) -> float:
    """The temperature within TEMPERATURE_BOUNDS at which a loss with one minimum is least; 1 where none beats 1."""
    from scipy.optimize import minimize_scalar

    low, high = (math.log(bound) for bound in TEMPERATURE_BOUNDS)
    search = minimize_scalar(
        lambda log: loss(math.exp(log)), bounds=(low, high), method="bounded", options={"xatol": 1e-4}
    )
    return math.exp(search.x) if search.fun < loss(1.0) else 1.0


def rank_of_truth(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the true one: 0 where the prediction is right.

    Equal logits rank in the order of the classes, as argmax has it, so that top-1 and top-5 do not depend on chance.

    Args:
        logits: (N, K) floats.
        labels: (N,) classes.

    Returns:
        (N,) ranks from 0 to K - 1.
    """
    truth = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1]) < labels[:, None]
    return ((logits > truth) | ((logits == truth) & earlier)).sum(1)


def column(temperatures: Tensor | float) -> Tensor | float:
    """Temperatures (N,) as a column (N, 1), to divide logits (N, K) by; a number as it is."""
    return temperatures[:, None] if isinstance(temperatures, Tensor) else temperatures


def risk_coverage(confidence: ArrayLike, correct: ArrayLike) -> dict[str, Any]:
    """How many of the answers are wrong if only the surest images are answered.

    Args:
        confidence, correct: as in `reliability`, N of each, at least one.

    Returns:
        `coverage` and `risk`: the share that is answered and the share of these that is wrong, at 100 numbers of images
        or all there are; of equally sure images the wrong are taken to come first. `area`: the mean risk over all
        coverages.

    Source: El-Yaniv and Wiener, On the Foundations of Noise-free Selective Classification, 2010.
    """
    wrong = 1 - np.asarray(correct, dtype=np.float64)
    order = np.lexsort((-wrong, -np.asarray(confidence)))
    risk = wrong[order].cumsum() / np.arange(1, len(order) + 1)
    shown = np.unique(np.linspace(1, len(order), min(len(order), 100)).round().astype(int))
    return {
        "coverage": (shown / len(order)).round(6).tolist(),
        "risk": risk[shown - 1].round(6).tolist(),
        "area": float(risk.mean()),
    }


def class_scores(right: int, images: int, predicted: int) -> dict[str, Any]:
    """Precision, recall, F1 and number of images of a class, of counts; None where one is a share of nothing."""
    return {
        "precision": right / predicted if predicted else None,
        "recall": right / images if images else None,
        "f1": 2 * right / (images + predicted) if images + predicted else None,
        "n": images,
    }


def require_finite_logits(logits: Tensor) -> None:
    """Refuse logits (N, K) that hold NaN or infinity.

    Raises:
        InputError: some do; it says how many images.
    """
    if broken := int((~logits.isfinite()).any(1).sum()):
        raise InputError(
            f"logits of {broken} of {len(logits)} images are not finite: the weights have diverged; "
            "train again with a lower --lr, or evaluate an earlier checkpoint"
        )


def evaluate_logits(
    logits: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    skipped: int = 0,
    temperatures: Tensor | float = 1.0,
    groups: NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    """Judge a classifier by its logits on labelled images.

    Args:
        logits: (N, K) floats.
        labels: (N,) integers, the true classes.
        classes: K different names, at least 2.
        skipped: images that could not be read; passed on, and counted in nothing else.
        temperatures: (N,), or one: what the logits are divided by for the scores that a user sees.
        groups: (N,): which images show one thing, so that intervals are of whole groups; None where nothing says so.

    Returns:
        Values that JSON can hold, never NaN; shares are in [0, 1].
        `n`: images; `groups`: of them, or None. `top1`, `top5` (top-K where K < 5): accuracy. `top1_ci95`: [low, high],
        see `share_interval`.
        `loss`: cross-entropy of the logits, natural logarithm. `ece`, `ece_ci95`: expected calibration error of the
        scores in 15 bins, [low, high] by bootstrap. `ece_raw`: the same without temperature. `temperature`: which would
        suit these very images best, see fit_temperature. `risk_coverage`: see there.
        `per_class`: {name: {precision, recall, f1, n}}, see class_scores.
        `confusion`: K lists of K counts, rows truth. `skipped`.

    Raises:
        InputError: there are no images, or a logit is not finite.
        ValueError: the shapes do not fit each other, or class names repeat.
    """
    if logits.shape != (len(labels), len(classes)) or len(set(classes)) != len(classes):
        raise ValueError(
            f"logits {tuple(logits.shape)}, {len(labels)} labels and {len(set(classes))} different class names do not "
            "fit; give logits (N, K), N labels and K different names"
        )
    if len(labels) == 0:
        raise InputError(
            f"0 images to evaluate ({skipped} skipped): none could be read; give a folder of readable images"
        )
    logits, labels = logits.detach().float().cpu(), labels.long().cpu()
    require_finite_logits(logits)
    size = len(classes)
    confusion = torch.bincount(labels * size + logits.argmax(1), minlength=size**2).reshape(size, size)
    counts = (table.tolist() for table in (confusion.diag(), confusion.sum(1), confusion.sum(0)))
    rank = rank_of_truth(logits, labels)
    correct = (rank == 0).numpy()
    raw, confidence = ((logits / t).softmax(1).amax(1).numpy() for t in (1.0, column(temperatures)))
    return {
        "n": len(labels),
        "groups": None if groups is None else len(np.unique(groups)),
        "top1": float(correct.mean()),
        "top5": (rank < 5).double().mean().item(),
        "top1_ci95": list(share_interval(correct, groups)),
        "loss": negative_log_likelihood(logits, labels),
        "ece": reliability(confidence, correct).ece,
        "ece_ci95": bootstrap_ece(confidence, correct, groups),
        "ece_raw": reliability(raw, correct).ece,
        "risk_coverage": risk_coverage(confidence, correct),
        "temperature": fit_temperature(logits, labels),
        "per_class": {name: class_scores(*row) for name, *row in zip(classes, *counts, strict=True)},
        "confusion": confusion.tolist(),
        "skipped": skipped,
    }
