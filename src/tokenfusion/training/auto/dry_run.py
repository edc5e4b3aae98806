"""What a run would take: counted from its data, and measured in a few training steps; nothing is written."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from rich.console import Console

from tokenfusion.compiled import require_compiler
from tokenfusion.data.augment import Augment
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import sample_images
from tokenfusion.data.loader import TrainLoader
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import choose_split
from tokenfusion.data.value_range import with_value_range
from tokenfusion.errors import InputError
from tokenfusion.formatting import counted, duration
from tokenfusion.hardware import available_mb, default_device, hardware_name, memory_in_words, resolve_precision
from tokenfusion.launch import read_launch
from tokenfusion.recipe import Recipe
from tokenfusion.training.auto.batch_size import choose_batch_size, more_than_there_are
from tokenfusion.training.auto.depth import DepthPlan, depth_table, plan_depths
from tokenfusion.training.auto.timing import StepCost, measuring_process
from tokenfusion.training.linear_start import require_tunable
from tokenfusion.training.model import build
from tokenfusion.training.recovery import OutOfMemory
from tokenfusion.training.schedule import MAX_EPOCHS
from tokenfusion.training.setup import Run

STEPS = 4
"""Training steps that are measured."""
SAMPLE = 64
"""Images that are read to measure the loader."""


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        model, data: as in Recipe.
        hardware, precision: what was measured on, and in what arithmetic.
        processes: that would train together; a batch is divided among them.
        classes, training_images, held_out_images: of the data, readable or not.
        batch_size, accumulate: images per optimiser step of all processes, and the parts each computes its share in.
        steps_per_epoch, epochs, steps: optimiser steps; with `epochs` auto the most there may be.
        step_seconds: of a process's share of a step, measured without the exchange of gradients.
        compile_seconds: before the first step, of a compiled one; else 0.
        loading_images_per_s: read and augmented by one process.
        images_per_s: of all processes, loading included.
        hours: of all steps, loading included; evaluation is not.
        peak_memory_mb: MiB of one process, without images kept in memory.
        available_mb: MiB that could be had now; None where that is not known.
        checkpoint_mb: MiB of a checkpoint.
    """

    model: str
    data: str
    hardware: str
    precision: str
    processes: int
    classes: int
    training_images: int
    held_out_images: int
    batch_size: int
    accumulate: int
    steps_per_epoch: int
    epochs: int
    steps: int
    step_seconds: float
    compile_seconds: float
    loading_images_per_s: float
    images_per_s: float
    hours: float
    peak_memory_mb: float
    available_mb: float | None
    checkpoint_mb: float


def plan(recipe: Recipe, say: Callable[[str], None]) -> Plan:
    """Count the steps of a run, and measure one.

    Args:
        recipe: what would be trained; under torchrun or SLURM, by as many processes as were started.
        say: told what `batch_size` auto tries and chooses, and what is not as the recipe has it.

    Raises:
        InputError: the recipe or its data cannot be used, or a step does not fit into memory.
    """
    if recipe.compile:
        require_compiler(default_device())
    launch = read_launch(os.environ)
    processes = launch.size if launch else 1
    source = open_dataset(recipe.data, recipe.exclude, reading=recipe.reading)
    split = choose_split(source, recipe.val_fraction, recipe.seed, recipe.rare_classes)
    source, line = with_value_range(source, split.train, recipe.value_range, recipe.max_pixels)
    if line:
        say(line)
    images, classes = len(split.train), len(source.classes)
    if "batch_size" in recipe.autos:
        recipe = choose_batch_size(recipe, classes, images, say)
    batch_size = recipe.batch_size_for(images, processes)
    if batch_size > images:
        say(more_than_there_are(batch_size, images))
        batch_size = images
    if "lr" in recipe.autos:
        say("lr=auto is not tried in a dry run: its range test, of up to 100 steps, comes on top")
    available = available_mb(default_device())
    cost = measure_step(recipe, classes, batch_size // processes)
    loading = loading_rate(recipe, source, split.train, cost.img_size)
    load_seconds = batch_size / processes / loading
    seconds = max(cost.seconds, load_seconds / recipe.workers) if recipe.workers else cost.seconds + load_seconds
    epochs = MAX_EPOCHS if recipe.epochs == "auto" else recipe.epochs
    steps_per_epoch = images // batch_size
    return Plan(
        model=recipe.model,
        data=recipe.data,
        hardware=hardware_name(default_device()),
        precision=resolve_precision(recipe.precision, default_device()),
        processes=processes,
        classes=classes,
        training_images=images,
        held_out_images=len(split.val),
        batch_size=batch_size,
        accumulate=recipe.accumulate,
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        steps=epochs * steps_per_epoch,
        step_seconds=cost.seconds,
        compile_seconds=cost.compile_seconds,
        loading_images_per_s=loading,
        images_per_s=batch_size / seconds,
        hours=epochs * steps_per_epoch * seconds / 3600,
        peak_memory_mb=cost.peak_memory_mb,
        available_mb=available,
        checkpoint_mb=cost.checkpoint_mb,
    )


def measure_step(recipe: Recipe, classes: int, batch_size: int) -> StepCost:
    """What a step on so many random images costs.

    Raises:
        InputError: they do not fit into memory.
    """
    with measuring_process(recipe, classes, STEPS) as measure:
        try:
            return measure(batch_size)
        except OutOfMemory as error:
            raise InputError(
                f"a batch of {batch_size} images does not fit into memory ({error}); give a smaller --batch-size, or "
                "more --accumulate"
            ) from error


def loading_rate(recipe: Recipe, source: Dataset, training: np.ndarray, img_size: tuple[int, int]) -> float:
    """Images per second that one process reads and augments, measured on a few of them.

    Where all would fit into the recipe's cache, reading is not counted, as it is done once.
    """
    limits = {"max_pixels": recipe.max_pixels, "cache_bytes": recipe.cache_mb * 2**20}
    images = sample_images(source, training, SAMPLE, **limits)
    augment = Augment.from_recipe(recipe, img_size)
    loader = TrainLoader(images, augment, batch_size=len(images), seed=recipe.seed, workers=0)
    for _ in loader.epoch(0):  # what is slow the first time
        pass
    start = perf_counter()
    for _ in loader.epoch(1):
        pass
    return len(images) / (perf_counter() - start)


def print_plan(recipe: Recipe, as_json: bool, write: Callable[[str], None], say: Callable[[str], None]) -> None:
    """What `train --dry-run` prints; of several processes the first one measures, and speaks for all.

    Args:
        recipe: what would be trained.
        as_json: whether to print JSON rather than lines to read.
        write, say: print the plan, and what is said on the way.
    """
    launch = read_launch(os.environ)
    if launch and launch.rank:
        return
    planned: DepthPlan | Plan = plan_stages(recipe) if recipe.tune else plan(recipe, say)
    if as_json:
        write(json.dumps(asdict(planned), indent=2, ensure_ascii=False))
        return
    if isinstance(planned, DepthPlan):
        table = depth_table(planned, auto=recipe.tune == "auto")
    else:
        table = plan_table(planned, epochs_auto="epochs" in recipe.autos)
    for name, value in table:
        write(f"{name:<13} {value}")


def plan_stages(recipe: Recipe) -> DepthPlan:
    """What the stages of a run would take.

    Raises:
        InputError: the recipe or its data cannot be used.
    """
    source = open_dataset(recipe.data, recipe.exclude, reading=recipe.reading)
    classifier = build(recipe, source.classes)
    require_tunable(classifier, source, recipe, Run(Path(), Console(quiet=True)))
    split = choose_split(source, recipe.val_fraction, recipe.seed, recipe.rare_classes)
    return plan_depths(recipe, classifier, source, split)


def plan_table(planned: Plan, epochs_auto: bool) -> list[tuple[str, str]]:
    """A plan as names and values to read.

    Args:
        planned: what is told.
        epochs_auto: whether its epochs are a ceiling only.
    """
    share = planned.batch_size // planned.processes
    batch = f"{counted(planned.batch_size, 'image')} a step"
    if planned.processes > 1:
        batch += f": {share:,} in each of {planned.processes} processes"
    if planned.accumulate > 1:
        batch += f", in {planned.accumulate} parts"
    at_most = "at most " * epochs_auto
    images = f"{planned.training_images:,} training and {planned.held_out_images:,} held-out"
    epochs, took = counted(planned.epochs, "epoch"), duration(planned.hours * 3600)
    seconds = planned.compile_seconds
    before = f"{duration(seconds)} measured, before the first step; less where it was compiled before"
    return [
        ("model", planned.model),
        ("hardware", f"{planned.hardware}, {planned.precision}"),
        ("images", f"{images} of {counted(planned.classes, 'class')}"),
        ("batch", batch),
        ("steps", f"{planned.steps_per_epoch:,} an epoch, {at_most}{epochs}, {planned.steps:,} in all"),
        *[("compiling", before)] * bool(seconds),
        ("a step", f"{planned.step_seconds:.3g} s measured, without loading and without exchanging gradients"),
        ("loading", f"{planned.loading_images_per_s:,.0f} images/s by one process"),
        ("training", f"{planned.images_per_s:,.1f} images/s, {at_most}{took} without evaluation"),
        ("memory", memory_in_words(planned.peak_memory_mb, planned.available_mb)),
        ("disk", f"{2 * planned.checkpoint_mb:,.1f} MB: a checkpoint, and while it is written the one before"),
    ]
