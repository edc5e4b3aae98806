"""The gate: an artefact answers as its run does on the run's own held-out images, or it is refused."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as F

from tokenfusion.calibrate import surest_errors
from tokenfusion.classifier import Classifier
from tokenfusion.data.decoded import Images
from tokenfusion.evaluate import as_outputs, output_of_class
from tokenfusion.formatting import Progress, unheard
from tokenfusion.hardware import resolve_precision
from tokenfusion.judged import read_own_part
from tokenfusion.metrics import wilson_interval
from tokenfusion.recipe import Recipe, load_recipe
from tokenfusion_runtime.image import prepare
from tokenfusion_runtime.prediction import Floats

MOST_IMAGES = 2000
BATCHES = (7, 2, 1, 64)
"""Sizes of the batches that the artefact is given in turn; engines choose their ways by size, and 64 is what `predict`
gives at once."""
SHOWN = 10
"""Images that differ which are named."""
PIXEL_LEVELS, PIXEL_SHARE = 2, 1e-4
"""What the run's resize and the runtime's may differ by: grey levels, and the share of values more than one level off.

Both resize rows, then columns, and round after either. PyTorch's kernel for CPUs without AVX-512 has weights of 16
bits, Pillow's has more: where a value lies near the middle of two levels either pass may round otherwise, seldom both.
"""


@dataclass(frozen=True)
class Limits:
    """What an artefact may differ by from its run."""

    probability: float
    """Greatest difference of a probability."""
    agreement: float
    """Least share of images with the same labels."""
    accuracy: float
    """Most that accuracy may fall."""


LIMITS = {
    "fp32": Limits(1e-4, 1.0, 0.0),
    "fp16": Limits(math.inf, 0.995, 1.0),
    "bf16": Limits(math.inf, 0.995, 1.0),
    "int8": Limits(math.inf, 0.0, 0.005),
}


def held_out_images(run: Path, classifier: Classifier) -> tuple[Images, NDArray[Any], str]:
    """A run's held-out images, at most MOST_IMAGES spread evenly, their labels as outputs, and their part's name."""
    recipe = Recipe(**load_recipe(run / "recipe.toml"))
    images, _, name = read_own_part(run, recipe, most=MOST_IMAGES)
    labels = as_outputs(images.labels, output_of_class(images.dataset, classifier.classes), len(classifier.classes))
    return images, labels.numpy(), name


def measure(
    classifier: Classifier,
    artefact: Callable[[NDArray[np.uint8]], Floats],
    images: Images,
    labels: NDArray[Any],
    progress: Progress = unheard,
) -> dict[str, Any]:
    """Let run and artefact judge the same pixels, in batches of 7, 2, 1 and 64 in turn, and tell of the images judged.

    The run's answers are those of its weights in float32, the same on every machine. What `predict` computes in, bf16
    where the hardware has it, is measured beside: nothing is refused for it.

    Returns:
        What `model.json` holds as `parity`: `n`, `probability_difference` (greatest) and `furthest`, the name of its
        image, `not_finite`: of how many images a score is no number, which are neither right nor alike,
        `label_agreement`, `accuracy_run` and `accuracy` (of multi-label models all classes of an image right),
        `accuracy_difference_ci95`
        (paired, normal; without a change Wilson's of none to either side), `pixel_difference`
        (greatest between the run's resize and the runtime's, grey levels), `pixel_share` (of values more than one off),
        `batches`, `differing`: names of the first images with other labels, `predict`: the same of the classifier
        as `predict` runs it on this CPU, in its `precision`, and `surest_errors`: where the artefact's errors lie.
    """
    exact = replace(classifier, precision="fp32")
    precision = resolve_precision(classifier.precision, classifier.device)
    ours, theirs, shown, differences = [], [], [], np.zeros(256, np.int64)
    for batch in batches_of(len(images)):
        decoded = [images[index] for index in batch]
        prepared = torch.stack([classifier.preprocess.resize(image) for image in decoded])
        outside = np.stack([prepare(F.to_pil_image(image), classifier.preprocess.to_dict()) for image in decoded])
        differences += np.bincount(np.abs(outside.astype(int) - prepared.numpy()).ravel(), minlength=256)
        ours.append(exact.scores(exact.logits(prepared)).numpy())
        theirs.append(artefact(prepared.numpy()))
        shown.append(ours[-1] if precision == "fp32" else classifier.scores(classifier.logits(prepared)).numpy())
        progress("judging images", batch.stop, len(images))
    run, found, predicted = map(np.concatenate, (ours, theirs, shown))
    said_by_run, said, said_by_predict = (
        labels_of(scores, classifier.thresholds) for scores in (run, found, predicted)
    )
    finite = np.isfinite(found).all(1)
    same, as_predicted = (
        (other == said).reshape(len(run), -1).all(1) & finite for other in (said_by_run, said_by_predict)
    )
    right_run, right = ((answers == labels).reshape(len(run), -1).all(1) for answers in (said_by_run, said))
    right &= finite
    change = right.astype(float) - right_run
    half = 1.96 * float(change.std()) / math.sqrt(len(change)) if change.any() else wilson_interval(0, len(change))[1]
    return {
        "n": len(run),
        "probability_difference": float(greatest_differences(run, found).max()),
        "furthest": images.names[greatest_differences(run, found).argmax()],
        "not_finite": int((~finite).sum()),
        "label_agreement": float(same.mean()),
        "accuracy_run": float(right_run.mean()),
        "accuracy": float(right.mean()),
        "accuracy_difference_ci95": [float(change.mean()) - half, float(change.mean()) + half],
        "pixel_difference": int(differences.nonzero()[0][-1]),
        "pixel_share": float(differences[2:].sum() / differences.sum()),
        "batches": list(BATCHES),
        "surest_errors": [
            asdict(one)
            for one in surest_errors(
                torch.from_numpy(np.nan_to_num(found)), torch.from_numpy(labels), classifier.thresholds
            )
        ],
        "differing": [images.names[index] for index in np.flatnonzero(~same)[:SHOWN]],
        "predict": {
            "precision": precision,
            "probability_difference": float(greatest_differences(predicted, found).max()),
            "label_agreement": float(as_predicted.mean()),
        },
    }


def greatest_differences(scores: Floats, others: Floats) -> Floats:
    """Of the probabilities (N, K) of each image, (N,); 1 where one is no number."""
    return np.nan_to_num(np.abs(scores - others), nan=1.0).max(1)


def batches_of(count: int) -> Iterator[range]:
    """Indices in batches of BATCHES in turn; the last may be smaller."""
    start = 0
    for size in cycle(BATCHES):
        if start >= count:
            return
        yield range(start, min(start + size, count))
        start += size


def labels_of(scores: Floats, thresholds: tuple[float, ...]) -> NDArray[Any]:
    """What scores (N, K) say: a class (N,), or of multi-label models bool (N, K)."""
    return scores >= np.array(thresholds) if thresholds else scores.argmax(1)


def faults(parity: dict[str, Any], precision: str) -> list[str]:
    """Which limits of a precision are exceeded, in words."""
    limits, fall = LIMITS[precision], parity["accuracy_run"] - parity["accuracy"]
    return [
        text
        for exceeded, text in (
            (
                parity["not_finite"] > 0,
                f"of {parity['not_finite']:,} of {parity['n']:,} images a score is no number",
            ),
            (
                parity["probability_difference"] > limits.probability,
                f"a probability of {parity['furthest']} differs by {parity['probability_difference']:.2g}, at most "
                f"{limits.probability:g} may",
            ),
            (
                parity["label_agreement"] < limits.agreement,
                f"{parity['label_agreement']:.2%} of the labels are the same, {limits.agreement:.1%} must be",
            ),
            (
                fall > limits.accuracy + 1e-12,
                f"accuracy falls by {fall:.2%}, at most {limits.accuracy:.1%} is allowed",
            ),
            (
                parity["pixel_difference"] > PIXEL_LEVELS or parity["pixel_share"] > PIXEL_SHARE,
                f"resized pixels differ by up to {parity['pixel_difference']} grey levels, {parity['pixel_share']:.2%} "
                f"of them by more than one; at most {PIXEL_LEVELS} and {PIXEL_SHARE:.2%} may",
            ),
        )
        if exceeded
    ]


def parity_lines(parity: dict[str, Any]) -> list[str]:
    """The gate's table, line by line."""
    (low, high), shown = parity["accuracy_difference_ci95"], parity["predict"]
    lines = [
        f"{parity['n']:,} held-out images in batches of {', '.join(map(str, sorted(parity['batches'])))}; run in fp32:",
        f"  greatest difference of a probability  {parity['probability_difference']:.2g}",
        f"  same labels                           {parity['label_agreement']:.2%}",
        f"  accuracy of run and artefact          {parity['accuracy_run']:.2%}, {parity['accuracy']:.2%} "
        f"(95 % interval of the difference {low:+.2%} to {high:+.2%})",
        f"  greatest difference of a pixel        {parity['pixel_difference']} grey level(s), "
        f"more than one in a share of {parity['pixel_share']:.2g}",
        f"`predict` computes in {shown['precision']} on this CPU: greatest difference from the artefact "
        f"{shown['probability_difference']:.2g}, same labels {shown['label_agreement']:.2%}",
    ]
    return lines + [f"  differs: {name}" for name in parity["differing"]]
