"""How long a training step takes a model on this machine, for budgets in minutes."""

import statistics
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from tokenfusion.compare.contenders import Contender
from tokenfusion.compare.results import ANEW
from tokenfusion.data.augment import Augment
from tokenfusion.data.decoded import sample_images
from tokenfusion.data.loader import TrainLoader
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import choose_split
from tokenfusion.errors import InputError
from tokenfusion.files import read_json, write_json
from tokenfusion.hardware import keep_freed_memory
from tokenfusion.processes import in_fresh_process
from tokenfusion.recipe import Recipe
from tokenfusion.training import FREE_TO_CHANGE, build
from tokenfusion.training.faults import BadStep, OutOfMemory, out_of_memory_named
from tokenfusion.training.fit import Job, train_step
from tokenfusion.training.mixing import BatchMixing
from tokenfusion.training.optimizer import make_optimizer
from tokenfusion.training.state import TrainState, fingerprint

BATCHES, WARM_UP, STEPS, SECONDS = 4, 3, 8, 2.0


def epoch_minutes(
    models: list[Contender], recipe: Recipe, threads: int, path: Path
) -> tuple[dict[str, float], dict[str, str]]:
    """Minutes of an epoch's training steps, measured once and kept.

    Args:
        models: each is measured in a process of its own.
        recipe: what all runs share.
        threads: of each run.
        path: file that holds what was measured, so that a comparison that goes on has the same epochs.

    Returns:
        Minutes by model; of the others, why they cannot be trained.
    """
    kept: dict[str, dict[str, Any]] = read_json(path, ANEW) if path.exists() else {}
    failed: dict[str, str] = {}
    for model in models:
        own = replace(recipe, model=model.name)
        key = fingerprint(replace(own, **FREE_TO_CHANGE, epochs=1, seed=0))
        if kept.get(model.name, {}).get("key") != key:
            try:
                kept[model.name] = {"minutes": measure(own, threads), "key": key, "threads": threads}
            except InputError as error:
                failed[model.name] = str(error)
                continue
            write_json(path, kept)
    return {model.name: kept[model.name]["minutes"] for model in models if model.name not in failed}, failed


def measure(recipe: Recipe, threads: int) -> float:
    """Minutes of an epoch, measured in a process of its own."""
    try:
        return in_fresh_process(train_some_steps, recipe, threads)
    except BrokenProcessPool as error:
        raise InputError(
            f"{recipe.model} was stopped by the system while its steps were timed, most likely for want of memory; "
            "give a smaller --batch-size, or leave it out"
        ) from error


def train_some_steps(recipe: Recipe, threads: int) -> float:
    """What `measure` runs: the median of real steps, loading included, times the steps of an epoch."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    source = open_dataset(recipe.data, recipe.exclude)
    indices = choose_split(source, recipe.val_fraction, recipe.seed).train
    batch_size = min(recipe.batch_size_for(len(indices)), len(indices))
    limits = {"max_pixels": recipe.max_pixels, "cache_bytes": recipe.cache_mb * 2**20}
    images = sample_images(source, indices, BATCHES * batch_size, **limits)
    classifier = build(recipe, source.classes)
    size = classifier.preprocess.img_size
    augment = Augment.from_recipe(recipe, size)
    loader = TrainLoader(images, augment, batch_size=batch_size, seed=recipe.seed, workers=recipe.workers)
    job = Job(recipe, classifier, loader, BatchMixing(recipe, len(source.classes)), images, Path())
    state = TrainState(classifier.model, make_optimizer(classifier.model, recipe), recipe.ema, keep_best=False)
    times: list[float] = []
    epoch = 0
    while len(times) < WARM_UP + STEPS or sum(times) < SECONDS:
        clock = perf_counter()
        for batch in loader.epoch(epoch):
            with refusing(recipe.model):
                train_step(job, state, *batch)
                state.update_average()
            clock, elapsed = perf_counter(), perf_counter() - clock
            times.append(elapsed)
        epoch += 1
    loader.close()
    return statistics.median(times[WARM_UP:]) * (len(indices) // batch_size) / 60


@contextmanager
def refusing(model: str) -> Iterator[None]:
    """Refuse a model of which a step cannot be taken."""
    try:
        with out_of_memory_named():
            yield
    except (OutOfMemory, BadStep, InputError) as error:
        if isinstance(error.__cause__, OutOfMemory):  # while weights moved, of a run that there is none of
            error = error.__cause__
        if isinstance(error, InputError):
            raise
        short = isinstance(error, OutOfMemory)
        fault, remedy = (f"memory ran out ({error})", "smaller --batch-size") if short else (error, "lower --lr")
        raise InputError(f"{fault} while steps of {model} were timed; give a {remedy}, or leave it out") from None
