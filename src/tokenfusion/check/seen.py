"""What pretrained parents see of images, to judge labels by: the rows that training then begins with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from tokenfusion.check.inspection import Inspection
from tokenfusion.classifier import Classifier
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import Images
from tokenfusion.errors import InputError
from tokenfusion.features import Features, keep_features
from tokenfusion.models.pretrained import Say, find_weights, weighted_names
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.preset import begins_as_line
from tokenfusion.recipe import Recipe


def fetch_parents(recipe: Recipe, say: Say) -> None:
    """Have the weights that a recipe names on this machine.

    Raises:
        InputError: the model is no `fuse(CNN,VIT,probe)`, or its weights cannot be had.
    """
    if not begins_as_line(recipe.model):
        raise InputError(f"{recipe.model} keeps nothing to judge labels by; give --model fuse(CNN,VIT,probe)")
    find_weights(recipe.model, recipe.pretrained, say)
    say(f"loading the weights of {' and '.join(weighted_names(recipe.model))}")


def build_parents(recipe: Recipe, dataset: Dataset) -> Classifier:
    """The model of a recipe with its pretrained weights, whose parents look at the images as training's do.

    Raises:
        InputError: its weights cannot be had, or are another model's.
    """
    classifier = Classifier.create(
        recipe.model,
        dataset.classes,
        img_size=recipe.img_size or None,  # type: ignore[arg-type]
        crop_pct=None,
        pretrained=recipe.pretrained,
    )
    return replace(classifier, preprocess=replace(classifier.preprocess, value_range=dataset.value_range))


@dataclass(frozen=True, eq=False)
class Seen:
    """What both parents saw of the images that can be read.

    Attributes:
        features: of these images.
        images: int64 (N,), ascending: their indices in the data.
        model: whose parents they are.
    """

    features: Features
    images: np.ndarray
    model: ProbeFusion

    def means(self, images: np.ndarray) -> list[np.ndarray]:
        """Means of some images' tokens, as classifiers read them: the CNN's (n, c), the transformer's, both."""
        some = self.features.subset(np.searchsorted(self.images, images))
        means = np.concatenate([self.model.means(self.model.recall(rows)).numpy() for rows in some.batches()])
        cnn, vit = np.split(means, [self.model.channels[0]], axis=1)
        return [cnn, vit, means]


def see_images(
    classifier: Classifier, dataset: Dataset, inspections: list[Inspection], progress: Callable[[int, int], None]
) -> Seen:
    """What both parents see of the images that can be read, from disk where it was kept before.

    Args:
        classifier: whose parents look.
        dataset, inspections: the images, and what is known of each.
        progress: called with (images that were looked at, images in all).

    Raises:
        InputError: none can be read; and as `keep_features`.
    """
    readable = np.array([index for index, image in enumerate(inspections) if not image.reason], dtype=np.int64)
    if not len(readable):
        raise InputError(f"none of the {len(dataset):,} images can be read; check them without --pretrained")
    checksums = np.array([inspections[index].checksum for index in readable], dtype=np.uint64)
    images = Images(dataset.subset(readable), classifier.max_pixels, checksums=checksums)
    features = keep_features(classifier, images, progress=progress)
    return Seen(features, readable, cast(ProbeFusion, classifier.model))
