"""The training images that are nearest to an image, by what both parents of a `fuse(CNN,VIT,probe)` see of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from tokenfusion.classifier import Classifier
from tokenfusion.errors import InputError
from tokenfusion.features import Features, keep_features
from tokenfusion.files import write_csv
from tokenfusion.judged import read_own_part
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Neighbour:
    """A training image.

    Attributes:
        path, label: of it.
        likeness: cosine of the angle between what is seen of both images: 1 for the same.
    """

    path: str
    label: str
    likeness: float


LIKENESS = (
    "likeness: 1 is the same to both pretrained parents, 0 as unlike as two training images are on average, "
    "below 0 more unlike (the cosine between what they see of both images)"
)
"""What `Neighbour.likeness` says, for a person."""
NEAREST = "nearest.csv"
"""Of each held-out image of a run, the training images that are nearest to it."""
KEPT = 3
"""How many of these."""


def similar(
    run: Path, images: Sequence[str], topk: int = 5, progress: Callable[[int, int], None] | None = None
) -> list[list[Neighbour]]:
    """The nearest training images of each image.

    What the parents see of the training images is taken from where training kept it, or else kept now.

    Args:
        run: a finished run folder of a model `fuse(CNN,VIT,probe)`.
        images: paths.
        topk: how many neighbours of each.
        progress: called with images that the parents have looked at, and all.

    Raises:
        InputError: the run is of another model, its data is gone, or an image cannot be read.
    """
    classifier, recipe = Classifier.load(run), Recipe(**load_recipe(run / "recipe.toml"))
    if not isinstance(classifier.model, ProbeFusion):
        raise InputError(
            f"{run} is a run of {classifier.name}, which keeps nothing to compare images by; give a run of "
            "fuse(CNN,VIT,probe), such as one that --pretrained hub trains"
        )
    queries = means_of(classifier, prepared(classifier, images))
    training, _, _ = read_own_part(run, recipe, split="train")
    features = keep_features(classifier, training, workers=recipe.workers, progress=progress)
    return nearest(classifier, queries, features, topk)


def nearest(classifier: Classifier, queries: Tensor, training: Features, topk: int) -> list[list[Neighbour]]:
    """The nearest of the training images to each query, which is what `means_of_rows` gives, the nearest first."""
    likeness, which, start = torch.zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.long), 0
    for batch in training.batches():
        scores = queries @ means_of_rows(classifier, batch).T
        places = torch.arange(start, start + len(batch)).expand_as(scores)
        likeness, order = torch.cat([likeness, scores], dim=1).topk(min(topk, likeness.shape[1] + len(batch)), dim=1)
        which, start = torch.cat([which, places], dim=1).gather(1, order), start + len(batch)
    images = training.images
    names, classes, labels = images.names, images.dataset.classes, images.labels.tolist()
    return [
        [Neighbour(names[i], classes[labels[i]], value) for i, value in zip(*row, strict=True)]
        for row in zip(which.tolist(), likeness.tolist(), strict=True)
    ]


def write_nearest(classifier: Classifier, training: Features, held_out: Features, path: Path) -> None:
    """Write the training images that are nearest to each held-out image.

    Args:
        classifier: of the run, as it starts.
        training, held_out: what its parents saw.
        path: of the CSV.
    """
    everything = np.arange(len(training.images))
    queries = torch.cat([means_of_rows(classifier, batch) for batch in held_out.batches()])
    found = nearest(classifier, queries, training.subset(everything, views=1), KEPT)
    heading = [f"{what}_{rank}" for rank in range(1, KEPT + 1) for what in ("path", "label", "likeness")]
    rows = (
        (name, *(cell for other in others for cell in (other.path, other.label, f"{other.likeness:.4f}")))
        for name, others in zip(held_out.images.names, found, strict=True)
    )
    width = 1 + len(heading)
    write_csv(path, ("path", *heading), ((*row, *[""] * (width - len(row))) for row in rows))


def prepared(classifier: Classifier, images: Sequence[str]) -> Tensor:
    """Images as a model is given them, uint8 (B, in_chans, h, w)."""
    found = []
    for path in images:
        _, pixels = classifier.prepare(path)
        if isinstance(pixels, str):
            raise InputError(f"{path} cannot be read: {pixels}; give an image")
        found.append(pixels)
    return torch.stack(found)


@torch.inference_mode()
def means_of(classifier: Classifier, images: Tensor) -> Tensor:
    """What is compared of prepared images, (B, F) of length 1."""
    model = cast(ProbeFusion, classifier.model.eval())
    return means_of_rows(classifier, model.keep(classifier.to_input(images)).cpu())


@torch.inference_mode()
def means_of_rows(classifier: Classifier, rows: Tensor) -> Tensor:
    """The same of kept rows: standardised means of either parent, each of length 1, so that both count alike."""
    model = cast(ProbeFusion, classifier.model)
    means = model.standardize(model.means(model.recall(rows.to(classifier.device))))
    parts = means.tensor_split([model.channels[0]], dim=1)
    return torch.cat([torch.nn.functional.normalize(part, dim=1) for part in parts], dim=1).cpu() / np.sqrt(2)
