"""When to answer and when to say "none of these", so that few of the answers are wrong."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

DELTA = 0.05
"""Chance that a bound on the share of wrong answers does not hold: it is drawn from a sample."""
KEPT = 1000
"""Errors that are kept of a sample; where a bound would let more of them pass, it answers less than it could."""


@dataclass(frozen=True)
class SurestErrors:
    """Where, among held-out images ordered by their scores, the wrong ones lie: all that a bound on risk needs.

    Attributes:
        images: how many there are.
        ranks: of the wrong ones, from 1, the surest first.
        scores: of the same.
    """

    images: int
    ranks: tuple[int, ...]
    scores: tuple[float, ...]

    @classmethod
    def among(cls, scores: Sequence[float], right: Sequence[bool]) -> "SurestErrors":
        """The errors among images with these scores; of equal scores the wrong come first."""
        order = sorted(zip(scores, right, strict=True), key=lambda image: (-image[0], image[1]))
        wrong = [(rank, score) for rank, (score, is_right) in enumerate(order, start=1) if not is_right][:KEPT]
        return cls(len(order), tuple(rank for rank, _ in wrong), tuple(score for _, score in wrong))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SurestErrors":
        """The inverse of `dataclasses.asdict`."""
        return cls(values["images"], tuple(values["ranks"]), tuple(values["scores"]))

    def cut(self, risk: float) -> float:
        """Answer where the score is above this: infinity where nothing is to be answered, -1 where everything is.

        With a chance of 1 - DELTA over the draw of the held-out images, at most a share `risk` of the answers on images
        of the same kind is wrong, provided that surer answers are not wrong more often than less sure ones.

        Counts of answers are tested upwards, each by the binomial tail, until the first that fails: a fixed sequence,
        in which no test costs another its level. It begins with a quarter of the images, or with the fewest by which a
        bound can hold at all; with fewer, a single early error would end it.

        Source: Geifman and El-Yaniv, Selective Classification for Deep Neural Networks, 2017 (the bound); Angelopoulos
        et al., Learn then Test, arXiv 2110.01052, section 2 (fixed sequence testing).
        """
        first = max(images_needed(risk), self.images // 4)
        if self.images < first:
            return math.inf
        for errors, rank, score in zip(count(1), self.ranks, self.scores, strict=False):
            if tail(errors, max(rank, first), risk) > DELTA:
                return score if rank > first else math.inf
        return self.scores[-1] if len(self.ranks) == KEPT else -1.0


def why_silent(risk: float, errors: Sequence[SurestErrors]) -> str:
    """Why every answer is withheld at this risk, and what to give instead; "" where some may be given.

    Args:
        risk: the largest share of wrong answers.
        errors: of the model, or of each of its classes; empty where unknown.
    """
    if not errors or answers_some(risk, errors):
        return ""
    images, needed = errors[0].images, images_needed(risk)
    if images >= needed:
        larger = next((share for share in LARGER if share > risk and answers_some(share, errors)), None)
        remedy = f"give --abstain {larger:g}" if larger else "train on more images, or on better ones"
        wrong = f"too many of the surest answers on the {images:,} held-out images are wrong to promise {risk:g}"
        return f"{wrong}; {remedy}"
    least = math.ceil(1000 * (1 - DELTA ** (1 / images))) / 1000
    return f"{images:,} held-out images cannot promise {risk:g}: {needed:,} are needed, or --abstain {least:g} or more"


LARGER = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of wrong answers that are tried in the place of one that cannot be promised."""


def images_needed(risk: float) -> int:
    """The fewest held-out images by which a share of wrong answers can be promised at all: all of them named right."""
    return math.ceil(math.log(DELTA) / math.log1p(-risk))


def answers_some(risk: float, errors: Sequence[SurestErrors]) -> bool:
    """Whether a model, or a multi-label model of some of its classes, answers where it is sure."""
    return any(one.cut(risk) < math.inf for one in errors)


def why_unsure(unsure: int, risk: float, errors: Sequence[SurestErrors]) -> str:
    """Why some images are not answered, and what would help; "" where all are, or `why_silent` has said it of all.

    Args:
        unsure: how many images are not answered.
        risk, errors: as in `why_silent`, of a model of one class an image.
    """
    if not unsure or not errors or errors[0].cut(risk) == math.inf:
        return ""
    enough = f"only scores above {errors[0].cut(risk):.6f} are right often enough to promise {risk:g}"
    return f"unsure of {unsure:,}: {enough}; a larger --abstain, or more held-out images in training, answer more"


def tail(errors: int, answers: int, risk: float) -> float:
    """The chance of so few errors, or fewer, among answers that are each wrong with a chance `risk`."""
    if errors >= answers * risk:
        return 1.0  # above a half in truth, and far above any level
    odds, none = math.log(risk) - math.log1p(-risk), answers * math.log1p(-risk)
    ways = math.lgamma(answers + 1)
    return math.fsum(
        math.exp(ways - math.lgamma(k + 1) - math.lgamma(answers - k + 1) + k * odds + none) for k in range(errors + 1)
    )
