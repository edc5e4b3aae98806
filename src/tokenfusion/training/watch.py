"""What is measured of a model every few epochs while it trains, on the same held-out images each time."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tokenfusion.classifier import Classifier
from tokenfusion.data.decoded import Images
from tokenfusion.errors import InputError
from tokenfusion.recipe import Recipe
from tokenfusion.training.state import Record

Measure = Callable[[nn.Module, Tensor], Record]
"""Numbers by name, of a model on images (B, in_chans, h, w) as it takes them; the model is left as it was."""
WATCHED = 32
"""Held-out images that are looked at."""


@dataclass(frozen=True)
class Watch:
    """A measurement and its images.

    Attributes:
        measure: see `Measure`.
        images: (B, in_chans, h, w), always the same.
        every: epochs from one measurement to the next.
    """

    measure: Measure
    images: Tensor
    every: int

    def see(self, model: nn.Module, epoch: int) -> Record:
        """The numbers after an epoch, counted from 1; none between measurements."""
        return {} if epoch % self.every else self.measure(model, self.images)


def make_watch(recipe: Recipe, measure: Measure | None, classifier: Classifier, held_out: Images) -> Watch | None:
    """What the recipe wants measured; None where it wants nothing."""
    if not recipe.every or measure is None:
        return None
    spread = np.linspace(0, len(held_out) - 1, min(WATCHED, len(held_out))).round().astype(int).tolist()
    images = torch.stack([classifier.preprocess.resize(held_out[index]) for index in spread])
    return Watch(measure, classifier.to_input(images), recipe.every)


def require_measurable(recipe: Recipe, measure: Measure | None, classifier: Classifier) -> None:
    """Refuse before any image is read what could not be measured after the first epochs.

    Raises:
        InputError: the recipe wants a measurement, and there is none or the model does not allow it.
    """
    if not recipe.every:
        return
    if measure is None:
        raise InputError(f"every={recipe.every} has nothing to measure here; give 0, or train by `tokenfusion train`")
    blank = torch.zeros(2, classifier.preprocess.in_chans, *classifier.preprocess.img_size, device=classifier.device)
    try:
        measure(classifier.model, blank)
    except InputError as error:
        refused = f"every={recipe.every} does not go with {recipe.model}"
        raise InputError(f"{refused}: {error}; or leave out --every") from error
