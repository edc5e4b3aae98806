"""What pretrained parents see of images, to judge labels by: the rows that training then takes from the same cache."""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch

from tokenfusion.classifier import Classifier
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import read_images
from tokenfusion.data.split import choose_split
from tokenfusion.errors import InputError
from tokenfusion.features import keep_features
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.recipe import Recipe


def build_parents(recipe: Recipe, dataset: Dataset) -> Classifier:
    """The model of a recipe with its pretrained weights, whose parents look at the images.

    Raises:
        InputError: it is no `fuse(CNN,VIT,probe)`, or its weights cannot be had.
    """
    classifier = Classifier.create(
        recipe.model,
        dataset.classes,
        img_size=recipe.img_size or None,  # type: ignore[arg-type]
        crop_pct=None,
        pretrained=recipe.pretrained,
    )
    if not isinstance(classifier.model, ProbeFusion):
        raise InputError(f"{recipe.model} keeps nothing to judge labels by; give --model fuse(CNN,VIT,probe)")
    return classifier


@torch.inference_mode()
def see_images(
    classifier: Classifier, dataset: Dataset, readable: np.ndarray, progress: Callable[[int, int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Means of both parents' tokens, (N, F) of N readable images, and the indices of these.

    Training and held-out images are looked at apart, as `train` does by its defaults, which then finds them.
    """
    model, found, order, before = cast(ProbeFusion, classifier.model), [], [], 0

    def tell(done: int, _of_part: int) -> None:
        progress(before + done, len(readable))

    for part in parts_of(dataset, readable):
        images, _ = read_images(dataset, part, max_pixels=classifier.max_pixels, cache_bytes=Recipe.cache_mb * 2**20)
        if len(images) != len(part):
            raise InputError(f"{len(part) - len(images)} images have become unreadable meanwhile; check again")
        features = keep_features(classifier, images, progress=tell)
        found += [model.means(model.recall(rows.to(classifier.device))).cpu().numpy() for rows in features.batches()]
        order.append(part)
        before += len(part)
    return np.concatenate(found), np.concatenate(order)


def parts_of(dataset: Dataset, readable: np.ndarray) -> list[np.ndarray]:
    """Readable images that `train` learns from, those that it holds out, and the others."""
    try:
        split = choose_split(dataset, Recipe.val_fraction, Recipe.seed)
    except InputError:  # which the check-up says of its own
        return [readable]
    own = [np.intersect1d(part, readable) for part in (split.train, split.val)]
    return [part for part in (*own, np.setdiff1d(readable, np.concatenate(own))) if len(part)]
