"""What a training step takes on this machine: real steps, timed in a process of their own."""

import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, repeat
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from tokenfusion.compiled import compiled
from tokenfusion.data.augment import Augment
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import Images, sample_images
from tokenfusion.data.loader import Batch, TrainLoader
from tokenfusion.data.open import open_dataset
from tokenfusion.data.readers import as_pixels
from tokenfusion.data.split import choose_split
from tokenfusion.data.value_range import with_value_range
from tokenfusion.errors import InputError
from tokenfusion.hardware import default_device, keep_freed_memory, peak_memory_mb, resident_mb
from tokenfusion.processes import fresh_process, in_fresh_process
from tokenfusion.recipe import Recipe
from tokenfusion.training.distributed.world import Requests
from tokenfusion.training.model import build
from tokenfusion.training.objective import BatchMixing, asked, make_loss
from tokenfusion.training.optimizer import make_optimizer
from tokenfusion.training.recovery import BadStep, OutOfMemory, first_sentence
from tokenfusion.training.setup import Run, Setup
from tokenfusion.training.state import TrainState
from tokenfusion.training.step import train_step

WARM_UP, STEPS, SECONDS = 3, 8, 2.0
"""Steps of an epoch's timing that do not count, how many count at least, and for how long all are taken at least."""


def time_steps(setup: Setup, state: TrainState, batches: Iterable[Batch]) -> Iterator[float]:
    """Take a step on each batch, as the loop does.

    Yields:
        its seconds, those of loading the batch included.
    """
    requests, clock = Requests(), perf_counter()
    for batch in batches:
        train_step(setup, state, batch, requests)
        state.update_average()
        if setup.classifier.device.type == "cuda":
            torch.cuda.synchronize(setup.classifier.device)
        state.progress.step += 1
        clock, elapsed = perf_counter(), perf_counter() - clock
        yield elapsed


def prepare_steps(
    recipe: Recipe, images: Images, classes: tuple[str, ...], batch_size: int
) -> tuple[Setup, TrainState]:
    """A model and batches of some images, to take steps that no run keeps."""
    keep_freed_memory()
    classifier = build(recipe, classes, images.labels.ndim == 2)
    augment = Augment.from_recipe(recipe, classifier.preprocess.img_size)
    batches = TrainLoader(images, augment, batch_size=batch_size, seed=recipe.seed, workers=recipe.workers)
    mixing, loss = BatchMixing(recipe, len(classes)), make_loss(images, recipe)
    setup = Setup(recipe, Run(Path(), Console(quiet=True)), classifier, batches, mixing, loss, held_out=images)
    model, keep_best = classifier.model, recipe.patience > 0
    called = compiled(asked(model, recipe)) if recipe.compile else asked(model, recipe)
    return setup, TrainState(model, make_optimizer(model, recipe), recipe.ema, keep_best, called)


def every_epoch(loader: TrainLoader) -> Iterator[Batch]:
    """Batches of one epoch after another, without end."""
    for epoch in count():
        yield from loader.epoch(epoch)


# Steps on random images: memory and time.


@dataclass(frozen=True)
class StepCost:
    """What an optimiser step takes.

    Attributes:
        seconds: median over the steps after the first, without loading.
        compile_seconds: by which the first took longer where it is compiled, else 0.
        peak_memory_mb: MiB at most: the GPU's tensors or, on a CPU, the whole process without images kept in memory.
        grown_mb: MiB of these that the process did not hold before there was a model.
        checkpoint_mb: MiB of a checkpoint's tensors.
        img_size: height and width of the images.
    """

    seconds: float
    compile_seconds: float
    peak_memory_mb: float
    grown_mb: float
    checkpoint_mb: float
    img_size: tuple[int, int]


@contextmanager
def measuring_process(recipe: Recipe, classes: int, steps: int) -> Iterator[Callable[[int], StepCost]]:
    """A process of its own that trains so many steps on so many random images, as often as it is called.

    Larger batches must come after smaller ones. A call raises OutOfMemory where they do not fit, and InputError where
    the model cannot be built or trained so.
    """
    process = fresh_process()
    on_cpu = default_device().type == "cpu"
    before_mb = (process.submit(resident_mb, "VmRSS").result() if on_cpu else None) or 0.0

    def measure(images: int) -> StepCost:
        try:
            cost = process.submit(random_steps, recipe, classes, images, steps, torch.get_num_threads()).result()
        except BrokenProcessPool as error:
            raise OutOfMemory("the process was stopped by the system") from error
        except MemoryError as error:
            raise OutOfMemory(first_sentence(error)) from error
        return replace(cost, grown_mb=cost.peak_memory_mb - before_mb)

    try:
        yield measure
    finally:
        process.shutdown(cancel_futures=True)


def random_steps(recipe: Recipe, classes: int, images: int, steps: int, threads: int) -> StepCost:
    """What `measuring_process` does in the other process."""
    torch.set_num_threads(threads)
    # The cost depends neither on the rate nor on the order of the images.
    recipe = replace(recipe, lr=1e-6, workers=0, balance="none", batch_size=0)
    names = tuple(map(str, range(classes)))
    size = build(recipe, names).preprocess.img_size
    setup, state = prepare_steps(recipe, random_images(images, names, size), names, images)
    batch = next(setup.batches.epoch(0))
    times = list(time_steps(setup, state, repeat(batch, steps)))
    seconds = statistics.median(times[1:] or times)
    return StepCost(
        seconds=seconds,
        compile_seconds=max(times[0] - seconds, 0.0) if recipe.compile else 0.0,
        peak_memory_mb=peak_memory_mb(setup.classifier.device),
        grown_mb=0.0,
        checkpoint_mb=checkpoint_bytes(state) / 2**20,
        img_size=size,
    )


def random_images(number: int, classes: tuple[str, ...], img_size: tuple[int, int]) -> Images:
    """Labelled noise, in memory."""
    pixels = bytearray(os.urandom(number * 3 * img_size[0] * img_size[1]))
    dataset = Dataset(
        where="noise",
        names=[""] * number,
        labels=np.arange(number) % len(classes),
        classes=classes,
        splits=[""] * number,
        reader=as_pixels(pixels, [img_size] * number),
    )
    return Images(dataset, max_pixels=img_size[0] * img_size[1], cached=True)


def checkpoint_bytes(state: TrainState) -> int:
    """Bytes of the tensors that a state saves."""
    moments = [value for group in state.optimizer.state.values() for value in group.values()]
    weights = list(state.model.state_dict().values())
    copies = 1 + (state.average is not None) + (state.best is not None)
    return copies * sum(tensor.nbytes for tensor in weights) + sum(
        value.nbytes for value in moments if isinstance(value, Tensor)
    )


# Steps on a run's own images: minutes of an epoch.


def epoch_minutes(recipe: Recipe, threads: int) -> float:
    """Minutes of an epoch's training steps, loading included, from the median of a few.

    Args:
        recipe: what would be trained.
        threads: that it would have.

    Raises:
        InputError: the model cannot be built or trained so.
    """
    try:
        return in_fresh_process(own_steps, recipe, threads)
    except BrokenProcessPool as error:
        reason = "the process was stopped by the system, most likely for want of memory"
        raise no_steps(recipe, reason, "smaller --batch-size") from error


def no_steps(recipe: Recipe, reason: str, remedy: str) -> InputError:
    """The refusal of a model of which no step can be timed."""
    return InputError(f"{reason} while steps of {recipe.model} were timed; give a {remedy}, or leave it out")


def own_steps(recipe: Recipe, threads: int) -> float:
    """What `epoch_minutes` does in the other process."""
    torch.set_num_threads(threads)
    source = open_dataset(recipe.data, recipe.exclude, reading=recipe.reading)
    indices = choose_split(source, recipe.val_fraction, recipe.seed, recipe.rare_classes).train
    source, _ = with_value_range(source, indices, recipe.value_range, recipe.max_pixels)
    batch_size = min(recipe.batch_size_for(len(indices)), len(indices))
    limits = {"max_pixels": recipe.max_pixels, "cache_bytes": recipe.cache_mb * 2**20}
    images = sample_images(source, indices, 4 * batch_size, **limits)
    setup, state = prepare_steps(recipe, images, source.classes, batch_size)
    times: list[float] = []
    try:
        for seconds in time_steps(setup, state, every_epoch(setup.batches)):
            times.append(seconds)
            if len(times) >= WARM_UP + STEPS and sum(times) >= SECONDS:
                break
    except BadStep as error:
        raise no_steps(recipe, str(error), "lower --lr") from None
    except (OutOfMemory, InputError) as error:
        shortage = error if isinstance(error, OutOfMemory) else error.__cause__  # while weights moved, of no run
        if not isinstance(shortage, OutOfMemory):
            raise
        raise no_steps(recipe, f"memory ran out ({shortage})", "smaller --batch-size") from None
    finally:
        setup.batches.close()
    return statistics.median(times[WARM_UP:]) * (len(indices) // batch_size) / 60
