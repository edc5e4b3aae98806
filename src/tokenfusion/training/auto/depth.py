"""How deep a model that starts from trained parents is trained: what each depth would take, by a few measured steps."""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import cast

import numpy as np
import torch
from rich.console import Console

from tokenfusion.classifier import Classifier
from tokenfusion.data.augment import Augment
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import Images, sample_images
from tokenfusion.data.loader import TrainLoader, Views, as_it_is
from tokenfusion.data.split import Split
from tokenfusion.features import FeatureClassifier, FeatureHead, FeatureRows, Features, compute_rows, on_features
from tokenfusion.formatting import counted, duration
from tokenfusion.hardware import (
    available_mb,
    default_device,
    hardware_name,
    memory_in_words,
    peak_memory_mb,
    resolve_precision,
)
from tokenfusion.models.fused_model import PARENTS
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.preset import ON_KEPT_TOKENS, at_depth
from tokenfusion.recipe import DEPTHS, Depth, Recipe, number
from tokenfusion.training.auto.timing import every_epoch, time_steps
from tokenfusion.training.model import build
from tokenfusion.training.objective import BatchMixing, make_loss
from tokenfusion.training.optimizer import make_optimizer
from tokenfusion.training.setup import Run, Setup
from tokenfusion.training.state import TrainState
from tokenfusion.training.times import note_estimate

FEWEST = 100
"""Training images from which on a part of them can say whether more than a linear classifier is worth it."""
TOO_FEW = f"fewer than {FEWEST} training images cannot say whether more is better"
TWICE = 1.8
"""A stage is tried on four fifths of the training images before it is trained on all."""
WARM, SAMPLE, STEPS = 8, 32, 3
"""Images that parents look at before it counts and when it counts, and steps of each kind that are taken."""
LEAST_STEP = 2.0
"""A training step on images costs as much as so many looks at them at least, for it has a backward pass too: where even
that takes too long, no such step is measured."""
LINES, VOTES = 0.006, 0.02
"""Seconds an image and ten classes that linear classifiers take on means alone, and on every token too: a core, by the
draws of `benchmarks/results/pretrained.json` that other work disturbed least, and a third more."""


@dataclass(frozen=True)
class DepthPlan:
    """What the depths of training would take.

    Attributes:
        model, data, views: as in Recipe.
        hardware, precision: what was measured on, and in what arithmetic.
        classes, training_images, held_out_images: of the data.
        seconds: of each depth that may be chosen, about, with those before it.
        epochs: of each of these, by itself; 0 of the linear classifier, which is fitted at once.
        tune: the depth that would be trained.
        minutes: that auto may take.
        looked_per_s: images a second that the parents look at.
        kept_mb: MiB that are kept of what they see.
        weights_mb: MiB of the model's weights.
        peak_memory_mb: MiB of this process while it measured, without images kept in memory.
        available_mb: MiB that could be had before; None where that is not known.
    """

    model: str
    data: str
    views: int
    hardware: str
    precision: str
    classes: int
    training_images: int
    held_out_images: int
    seconds: dict[Depth, float]
    epochs: dict[Depth, int]
    tune: Depth
    minutes: float
    looked_per_s: float
    kept_mb: float
    weights_mb: float
    peak_memory_mb: float
    available_mb: float | None


def plan_depths(recipe: Recipe, classifier: Classifier, source: Dataset, split: Split) -> DepthPlan:
    """What the depths would take, for `--dry-run`."""
    limits = {"max_pixels": recipe.max_pixels, "cache_bytes": recipe.cache_mb * 2**20}
    sample = sample_images(source, split.train, SAMPLE, **limits)
    return measure_depths(recipe, classifier, sample, len(split.train), len(split.val))


def choose_depth(recipe: Recipe, classifier: Classifier, training: Images, held_out: int, run: Run) -> Recipe:
    """The recipe with the deepest training that fits into its minutes, said before it starts.

    Args:
        recipe: whose `tune` is auto.
        classifier: of the run, which is left as it is.
        training: images.
        held_out: how many are held out.
        run: told what each depth takes, and which it is; keeps the estimate.
    """
    if len(allowed_depths(recipe, len(training))) == 1:
        run.say(f"tune=auto takes {DEPTHS[0]}: {TOO_FEW}")
        return at_depth(recipe, DEPTHS[0])
    sample = training.subset(np.arange(min(SAMPLE, len(training))))
    run.say(f"measuring on {counted(len(sample), 'image')} how long training takes")
    planned = measure_depths(recipe, classifier, sample, len(training), held_out)
    run.say(depths_in_words(planned))
    note_estimate(run.folder, planned.seconds[planned.tune])
    return at_depth(recipe, planned.tune)


def measure_depths(recipe: Recipe, classifier: Classifier, sample: Images, training: int, held_out: int) -> DepthPlan:
    """Let the parents look at a sample, take a few steps of each kind that may be chosen, and count on from there.

    Args:
        recipe: of the run.
        classifier: of the run, or like it; it is left as it is: steps are taken by one of random weights, as costly.
        sample: some training images.
        training, held_out: how many images there are.
    """
    classes, allowed = classifier.classes, allowed_depths(recipe, training)
    available = available_mb(default_device())
    limit = 60 * recipe.tune_minutes if recipe.tune == "auto" else float("inf")
    look_at(classifier, sample, min(WARM, len(sample)))  # what is slow the first time
    clock = perf_counter()
    rows = look_at(classifier, sample, len(sample))
    look = (perf_counter() - clock) / len(sample)
    views, epochs = recipe.views * training, epochs_by_depth(recipe)
    lines, looking = views * len(classes) / 10, look * (views + held_out)
    seconds: dict[Depth, float] = {"probe": looking + lines * LINES}
    stepping = build(recipe, classes) if len(allowed) > 1 and seconds["probe"] <= limit else classifier
    model = cast(ProbeFusion, stepping.model)
    if stepping is not classifier:
        model.freeze(*PARENTS)
        features = Features(sample, FeatureRows(Path(), rows), np.arange(len(sample)).reshape(1, -1))
        token_step = image_seconds(on_features(stepping), features.as_images(), on_tokens(recipe))
        seconds["fusion"] = looking + TWICE * (lines * VOTES + epochs["fusion"] * views * token_step)
        further = seconds["fusion"] + epochs["all"] * look * (0.2 * training + held_out)
        if "all" in allowed and further + TWICE * epochs["all"] * training * LEAST_STEP * look <= limit:
            model.freeze()
            step = image_seconds(stepping, sample, at_depth(recipe, "all"))
            seconds["all"] = further + TWICE * epochs["all"] * training * step
    return DepthPlan(
        model=recipe.model,
        data=recipe.data,
        views=recipe.views,
        hardware=hardware_name(default_device()),
        precision=resolve_precision(recipe.precision, default_device()),
        classes=len(classes),
        training_images=training,
        held_out_images=held_out,
        seconds=seconds,
        epochs={depth: epochs[depth] for depth in seconds},
        tune=deepest_within(recipe, seconds, training),
        minutes=recipe.tune_minutes,
        looked_per_s=1 / look,
        kept_mb=2 * cast(ProbeFusion, classifier.model).row_length * (views + held_out) / 2**20,
        weights_mb=sum(tensor.nbytes for tensor in classifier.model.state_dict().values()) / 2**20,
        peak_memory_mb=peak_memory_mb(default_device()),
        available_mb=available,
    )


def deepest_within(recipe: Recipe, seconds: dict[Depth, float], training: int) -> Depth:
    """The recipe's depth, or of auto the deepest that its minutes and the number of images allow."""
    if recipe.tune in DEPTHS:
        return recipe.tune
    allowed = [depth for depth in allowed_depths(recipe, training) if depth in seconds]
    return next((depth for depth in allowed[::-1] if seconds[depth] <= 60 * recipe.tune_minutes), DEPTHS[0])


def allowed_depths(recipe: Recipe, training: int) -> tuple[Depth, ...]:
    """The depths that so many training images allow: of auto the first alone where they are few, else up to its own."""
    if recipe.tune in DEPTHS:
        return DEPTHS[: DEPTHS.index(recipe.tune) + 1]
    return DEPTHS if training >= FEWEST else DEPTHS[:1]


def depths_in_words(planned: DepthPlan) -> str:
    """What the depths that may be chosen would take, and why auto takes one of them."""
    takes = ", ".join(f"{depth} {duration(seconds)}" for depth, seconds in planned.seconds.items())
    few = planned.training_images < FEWEST
    why = (
        TOO_FEW
        if few
        else (
            f"the deepest within tune_minutes={planned.minutes:g}"
            if planned.seconds[planned.tune] <= 60 * planned.minutes
            else f"none fits into tune_minutes={planned.minutes:g}, and this is the least"
        )
    )
    return f"about {takes}; tune=auto takes {planned.tune}: {why}"


def depth_table(planned: DepthPlan, auto: bool) -> list[tuple[str, str]]:
    """A plan as names and values to read."""
    images = f"{planned.training_images:,} training and {planned.held_out_images:,} held-out"
    rate = f"{planned.looked_per_s:,.1f} images/s, {counted(planned.views, 'view')} of each training image"
    kept, weights = planned.kept_mb, planned.weights_mb
    shared = f"{kept:,.0f} of what the parents see, which other runs share, and {weights:,.0f} of weights"
    return [
        ("model", planned.model),
        ("hardware", f"{planned.hardware}, {planned.precision}"),
        ("images", f"{images} of {counted(planned.classes, 'class')}"),
        ("looking", rate),
        *((depth, f"about {duration(took)}, {by_epochs(planned, depth)}") for depth, took in planned.seconds.items()),
        ("memory", memory_in_words(planned.peak_memory_mb, planned.available_mb)),
        ("disk", f"{kept + weights:,.0f} MB: {shared}; a few times the weights while all of them are trained"),
        ("tune", depths_in_words(planned).partition("; tune=")[2] if auto else planned.tune),
    ]


def by_epochs(planned: DepthPlan, depth: Depth) -> str:
    """How many epochs a depth trains for, those of the depths before it not counted."""
    count = planned.epochs[depth]
    return f"by {counted(count, 'epoch')}" if count else "fitted at once, without epochs"


def epochs_by_depth(recipe: Recipe) -> dict[Depth, int]:
    """The epochs of each depth by itself."""
    return {"probe": 0, "fusion": epochs_of(on_tokens(recipe)), "all": epochs_of(recipe)}


def on_tokens(recipe: Recipe) -> Recipe:
    """The recipe of training on kept tokens."""
    if recipe.tune == "auto":
        return at_depth(recipe, "fusion")
    return replace(recipe, **ON_KEPT_TOKENS) if recipe.tune == "all" else recipe


def epochs_of(recipe: Recipe) -> int:
    """Its epochs; of an open end, the default."""
    return Recipe.epochs if recipe.epochs == "auto" else number(recipe.epochs)  # type: ignore[return-value]


def look_at(classifier: Classifier, images: Images, count: int) -> np.ndarray:
    """What the parents see of the first images, float16 (count, F)."""
    views = Views(images, classifier.preprocess, None, 0, range(count))
    return torch.cat(list(compute_rows(classifier, views))).numpy()


def image_seconds(classifier: Classifier, images: Images, recipe: Recipe) -> float:
    """Seconds that a training step takes for each of its images, loading included."""
    model, tokens = classifier.model, isinstance(classifier, FeatureClassifier)
    size = min(recipe.batch_size_for(len(images)), len(images))
    augment = as_it_is if tokens else Augment.from_recipe(recipe, classifier.preprocess.img_size)
    loader = TrainLoader(images, augment, batch_size=size, seed=recipe.seed, workers=0)
    mixing, loss = BatchMixing(recipe, len(classifier.classes)), make_loss(images, recipe)
    setup = Setup(recipe, Run(Path(), Console(quiet=True)), classifier, loader, mixing, loss, images)
    network = FeatureHead(cast(ProbeFusion, model)) if tokens else model
    state = TrainState(model, make_optimizer(model, recipe), recipe.ema, keep_best=False, network=network)
    times = list(islice(time_steps(setup, state, every_epoch(loader)), STEPS))
    return median(times[1:]) / size
