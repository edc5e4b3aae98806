"""From probabilities to what is said of an image; the same for a run and for what was exported from it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenfusion_runtime.abstain import SurestErrors
from tokenfusion_runtime.errors import InputError

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image, or why it could not be read.

    Attributes:
        path: the file, or "" for an image given as an array.
        topk: (class name, softmax or, of multi-label models, sigmoid probability) of the best classes, best first.
        error: why there is no prediction; "" where there is one.
        labels: of multi-label models, (class name, probability) of all that reach their thresholds, best first.
        thresholds: of multi-label models, the threshold of each class by its name.
        abstains: whether the model is too unsure to name a class.
        unsure: of multi-label models that may abstain, the classes of which they say neither yes nor no.
    """

    path: str
    topk: tuple[tuple[str, float], ...] = ()
    error: str = ""
    labels: tuple[tuple[str, float], ...] | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    abstains: bool = False
    unsure: tuple[str, ...] | None = None

    @property
    def label(self) -> str:
        return self.topk[0][0] if self.topk and not self.abstains else ""

    @property
    def score(self) -> float | None:
        """Of the likeliest class, also where the model abstains; None where the image could not be read."""
        return self.topk[0][1] if self.topk else None

    def to_dict(self) -> dict[str, Any]:
        if self.error:
            return {"path": self.path, "error": self.error}
        if self.labels is not None:
            unsure = {} if self.unsure is None else {"unsure": list(self.unsure)}
            return {"path": self.path, "labels": self.rows(self.labels)} | unsure | {"topk": self.rows(self.topk)}
        label = None if self.abstains else self.label
        return {"path": self.path, "label": label, "score": self.score, "topk": self.rows(self.topk)}

    def rows(self, scores: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
        """Classes as JSON has them: label, score and, of multi-label models, threshold."""
        return [
            {"label": label, "score": score} | ({"threshold": self.thresholds[label]} if self.thresholds else {})
            for label, score in scores
        ]


@dataclass(frozen=True)
class Answers:
    """How probabilities become predictions.

    Attributes:
        classes: names in the order of the outputs.
        thresholds: of a multi-label model, the score from which an image has each class; empty of any other model.
        topk: how many classes a prediction names.
        cuts: answer only above these, see `SurestErrors.cut`: one, or of a multi-label model one a class; empty to
            answer always.
    """

    classes: tuple[str, ...]
    thresholds: tuple[float, ...] = ()
    topk: int = 5
    cuts: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require_count("topk", self.topk, "names no class")

    def predictions(self, prepared: Iterable[tuple[str, object]], scores: Iterable[Floats]) -> Iterator[Prediction]:
        """Predictions of images, of each its path and its pixels or why there are none.

        Args:
            prepared: the images.
            scores: the probabilities (K,) of each that has pixels.
        """
        rows = iter(scores)
        for path, pixels in prepared:
            yield Prediction(path, error=pixels) if isinstance(pixels, str) else self.prediction(path, next(rows))

    def prediction(self, path: str, scores: Floats) -> Prediction:
        """What probabilities (K,) say of an image."""
        if not np.isfinite(scores).all():
            return Prediction(path, error="the model's scores are not finite")
        order = np.argsort(-scores, kind="stable")
        named = order if self.thresholds else order[: self.topk]
        row = tuple((self.classes[index], float(scores[index])) for index in named)
        if not self.thresholds:
            return Prediction(path, row, abstains=bool(self.cuts) and row[0][1] <= self.cuts[0])
        by_name = dict(zip(self.classes, self.thresholds, strict=True))
        unsure: tuple[str, ...] | None = None
        if self.cuts:
            sure = sureness(scores, np.array(self.thresholds)) > np.array(self.cuts)
            unsure = tuple(name for name, is_sure in zip(self.classes, sure, strict=True) if not is_sure)
        reached = tuple((name, score) for name, score in row if score >= by_name[name] and name not in (unsure or ()))
        return Prediction(path, row[: self.topk], labels=reached, thresholds=by_name, unsure=unsure)


def sureness(scores: Floats, thresholds: Floats) -> Floats:
    """How far scores (..., K) are from their thresholds (K,), on the way to 0 or to 1: in [0, 1]."""
    below = (thresholds - scores) / np.maximum(thresholds, 1e-12)
    return np.where(scores >= thresholds, (scores - thresholds) / np.maximum(1 - thresholds, 1e-12), below)


def require_count(name: str, value: object, reason: str) -> None:
    """Refuse what is no whole number from 1 on, for a reason where it is a smaller one.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name}={value!r} is no whole number; give 1 or more")
    if value < 1:
        raise InputError(f"{name}={value} {reason}; give 1 or more")


def cuts_for(risk: float, errors: Sequence[SurestErrors]) -> tuple[float, ...]:
    """Above which scores to answer so that at most a share `risk` of the answers is wrong.

    Raises:
        InputError: `risk` is no share, or nothing is known of the errors.
    """
    if isinstance(risk, bool) or not isinstance(risk, Real) or not 0 < risk < 1:
        raise InputError(f"abstain={risk!r} is no share of wrong answers; give one between 0 and 1, such as 0.02")
    if not errors:
        raise InputError(
            "how sure its errors are was not measured when this classifier was trained, by an older version, so that "
            "it cannot abstain; train again"
        )
    return tuple(error.cut(risk) for error in errors)
