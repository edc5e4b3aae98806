"""Labels that a quick model disputes, and classes that are empty, rare or differ between splits.

The model is a logistic regression on oriented gradients and coarse colours of thumbnails, or on what pretrained parents
see (`seen.py`), each image judged by a model
that has not seen it (5-fold cross-validation). Which labels are disputed follows confident learning (Northcutt et al.,
"Confident learning", JAIR 2021): another class is likelier than it is on average for images of that class.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from tokenfusion.calibrate import choose_temperature
from tokenfusion.check.duplicates import gray
from tokenfusion.check.lucas_kanade import slopes
from tokenfusion.formatting import counted

MAX_JUDGED = 20_000
"""Most images whose labels are judged, an even sample of all."""
MIN_IMAGES = 10
"""Least images of a class whose labels are judged."""
FOLDS = 5
ORIENTATIONS = 8
TOO_FEW = f"fewer than two classes have {MIN_IMAGES} images, and {FOLDS} readable ones among those that are judged"
MARGIN = 0.5
"""How much likelier than its label another class must be for a strong dispute."""
RARE = 0.1
"""Share of the median class, below which a class is rare."""


class Dispute(NamedTuple):
    """A label that the model contradicts."""

    image: int
    suggestion: int
    """The class that is likelier."""
    score: float
    """Its probability."""
    label_score: float
    """The label's probability."""


class Judgement(NamedTuple):
    """What the quick model found."""

    disputes: list[Dispute]
    """The strongest first."""
    judged: int
    """How many images."""
    accuracy: float | None
    """Share of the labels that the model guesses right; None where nothing could be judged."""
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
    features: np.ndarray,
    labels: np.ndarray,
    indices: np.ndarray,
    groups: np.ndarray | None = None,
    c: float = 0.003,
    calibrate: bool = False,
) -> Judgement:
    """Cross-validate a quick model and find the labels that it strongly disputes.

    Args:
        features: float (N, F), such as `features_of` thumbnails.
        labels: int64 (N,).
        indices: int64 (N,), by which a Dispute names each image.
        groups: int64 (N,); images of one are judged by a model that has seen none of them.
        c: inverse strength of the model's penalty.
        calibrate: whether its probabilities are divided by the temperature that suits them best: a penalty makes them
            the flatter the fewer images there are.
    """
    from scipy.special import softmax
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    apart = np.arange(len(labels)) if groups is None else groups
    pairs = np.unique(np.stack([labels, apart]), axis=1)[0] if len(labels) else labels  # each group of a class once
    chosen = np.flatnonzero(np.bincount(pairs)[labels] >= FOLDS)
    known = np.unique(labels[chosen])
    if len(known) < 2:
        return Judgement([], 0, None, TOO_FEW)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-3, max_iter=1000))
    within = None if groups is None else groups[chosen]
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = kind(FOLDS, shuffle=True, random_state=0)
    given = np.searchsorted(known, labels[chosen])
    scores = cross_val_predict(model, features[chosen], given, cv=folds, method="predict_proba", groups=within)
    if calibrate:
        logits = np.log(scores.clip(1e-12))
        scores = softmax(logits / choose_temperature(torch.from_numpy(logits), torch.from_numpy(given)), axis=1)
    disputes = [
        dispute._replace(image=int(indices[chosen[dispute.image]]), suggestion=int(known[dispute.suggestion]))
        for dispute in disputed(scores, given)
    ]
    return Judgement(disputes, len(chosen), float((scores.argmax(1) == given).mean()))


def disputed(scores: np.ndarray, labels: np.ndarray) -> list[Dispute]:
    """The labels that probabilities contradict, the strongest first.

    Args:
        scores: float (N, K), out-of-fold probabilities.
        labels: int64 (N,), every class among them.
    """
    rows = np.arange(len(labels))
    own = scores[rows, labels]
    usual = np.bincount(labels, own) / np.bincount(labels)  # a class's mean probability for its own images
    confident = np.where(scores >= usual, scores, 0.0)
    confident[rows, labels] = 0
    other = confident.argmax(1)
    margin = confident[rows, other] - own
    found = np.flatnonzero((confident[rows, other] > 0) & (margin >= MARGIN))
    order = found[np.argsort(-margin[found])]
    return [Dispute(int(i), int(other[i]), float(scores[i, other[i]]), float(own[i])) for i in order]


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


def count_classes(classes: tuple[str, ...], labels: np.ndarray, splits: list[str]) -> list[dict[str, Any]]:
    """How many images every class has in every split, and what is unusual about that.

    Args:
        classes: K names.
        labels: int64 (N,), or bool (N, K).
        splits: N names.

    Returns:
        for each class its `name`, `images` by split, and `notes`.
    """
    member = labels if labels.ndim == 2 else labels[:, None] == np.arange(len(classes))
    names = sorted(set(splits), key=("train", "val", "test", "").index)
    inside = np.array(splits)
    counts = np.array([member[inside == name].sum(0) for name in names])  # splits × classes
    middle = float(np.median(counts.sum(0)))
    rows = []
    for label, name in enumerate(classes):
        notes = []
        total = int(counts[:, label].sum())
        if total == 0:
            notes.append("has no image")
        elif total < max(RARE * middle, MIN_IMAGES):
            notes.append(f"is rare: {counted(total, 'image')}, where the median class has {middle:g}")
        for part, split in enumerate(names):
            if total and not counts[part, label]:
                notes.append(f"has no image in {split}")
            elif total and split != names[0]:
                notes += note_on_shares(counts[0], counts[part], label, names[0], split)
        rows.append({"name": name, "images": dict(zip(names, counts[:, label].tolist(), strict=True)), "notes": notes})
    return rows


def note_on_shares(one: np.ndarray, other: np.ndarray, label: int, name: str, other_name: str) -> list[str]:
    """What to say where a class's share of two splits differs by half or more, and by more than chance."""
    from scipy.stats import fisher_exact

    a, b = one[label] / one.sum(), other[label] / other.sum()
    if not a or max(a / b, b / a) < 1.5:
        return []
    table = [[one[label], one.sum() - one[label]], [other[label], other.sum() - other[label]]]
    if fisher_exact(table).pvalue >= 0.01 / len(one):  # Bonferroni: as many tests as classes
        return []
    return [f"is {a:.1%} of {name} and {b:.1%} of {other_name}"]
