"""Scores to trust: the temperature that a run ships with, and how sure its wrong answers on held-out images are.

Both are measured on the held-out images. There, what one half of them chooses is judged by the other half, as are the
thresholds of multi-label models. `benchmarks/calibration.py` compares this with a temperature from training images.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenfusion.data.split import stratified
from tokenfusion.metrics import minimise_over_temperatures, negative_log_likelihood
from tokenfusion_runtime.abstain import SurestErrors
from tokenfusion_runtime.prediction import sureness


def choose_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that a classifier ships with, given its logits on images it was not trained on.

    Cross-entropy decides, with a standard normal prior on the temperature's logarithm: few images that happen to be all
    right would otherwise drive it to 0, and every score to 1. Against hundreds of images the prior has no weight.

    Args:
        logits: (N, K) floats.
        labels: int (N,), or bool (N, K) of any number of classes, whose cross-entropies are averaged over classes.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, section 4.2; the prior is ours.
    """
    images = len(labels)
    if not images:
        return 1.0

    def loss(temperature: float) -> float:
        if labels.ndim == 1:
            mean = negative_log_likelihood(logits, labels, temperature)
        else:
            mean = F.binary_cross_entropy_with_logits(logits.double() / temperature, labels.double()).item()
        return mean + float(np.log(temperature)) ** 2 / (2 * images)

    return minimise_over_temperatures(loss)


def halves(labels: Tensor) -> Tensor:
    """int64 (N,) of 0 and 1: each class's images in two halves, by chance but always the same."""
    fold = torch.zeros(len(labels), dtype=torch.int64)
    if len(labels) > 1:
        classes = labels if labels.ndim == 2 else F.one_hot(labels).bool()
        fold[torch.from_numpy(stratified(classes.numpy(), 0.5, seed=0))] = 1
    return fold


def cross_fitted_temperatures(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,): for each image the temperature that the other half of the images chooses."""
    fold = halves(labels)
    by_half = [choose_temperature(logits[fold != own], labels[fold != own]) for own in (0, 1)]
    return torch.tensor(by_half)[fold]


def surest_errors(scores: Tensor, labels: Tensor, thresholds: Sequence[float] = ()) -> tuple[SurestErrors, ...]:
    """Where the wrong answers lie among held-out images ordered by score, once, or for each class of multi-label data.

    Args:
        scores: (N, K) calibrated.
        labels: int (N,), or bool (N, K) with `thresholds`, which decide whether an image has a class.
    """
    if labels.ndim == 1:
        best = scores.max(1)
        return (SurestErrors.among(best.values.tolist(), (best.indices == labels).tolist()),)
    values, cuts = scores.numpy(), np.array(thresholds)
    right, sure = (values >= cuts) == labels.numpy(), sureness(values, cuts)
    return tuple(
        SurestErrors.among(*(column.tolist() for column in pair)) for pair in zip(sure.T, right.T, strict=True)
    )
