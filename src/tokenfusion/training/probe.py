"""What a training step takes on this machine: memory and time, measured in a process of its own."""

import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.hardware import (
    Precision,
    autocast,
    default_device,
    is_out_of_memory,
    keep_freed_memory,
    peak_memory_mb,
    resident_mb,
)
from tokenfusion.recipe import AUTO, Recipe
from tokenfusion.training.build import build
from tokenfusion.training.faults import OutOfMemory, first_sentence
from tokenfusion.training.mixing import BatchMixing
from tokenfusion.training.optimizer import make_optimizer, seed_step
from tokenfusion.training.state import TrainState


@dataclass(frozen=True)
class StepCost:
    """What an optimiser step takes.

    Attributes:
        images: in the step.
        seconds: median over the steps after the first.
        peak_memory_mb: MiB at most: the GPU's tensors or, on a CPU, the whole process without images kept in memory.
        checkpoint_mb: MiB of a checkpoint's tensors.
        img_size: height and width of the images.
    """

    images: int
    seconds: float
    peak_memory_mb: float
    checkpoint_mb: float
    img_size: tuple[int, int]


class Probe:
    """Measures training steps in another process; larger batches must come after smaller ones.

    Args:
        recipe: what would be trained.
        classes: how many there are.
        steps: optimiser steps of a measurement.

    Attributes:
        before_mb: MiB that its process held before there was a model; 0 on a GPU.
    """

    def __init__(self, recipe: Recipe, classes: int, steps: int) -> None:
        self.recipe, self.classes, self.steps = recipe, classes, steps
        self.process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        on_cpu = default_device().type == "cpu"
        self.before_mb = (self.process.submit(resident_mb, "VmRSS").result() if on_cpu else None) or 0.0

    def measure(self, images: int) -> StepCost:
        """Train on so many random images a step.

        Raises:
            InputError: the model cannot be built or trained so.
            OutOfMemory: they do not fit.
        """
        arguments = (self.recipe, self.classes, images, self.steps, torch.get_num_threads())
        try:
            return self.process.submit(run_steps, *arguments).result()
        except BrokenProcessPool as error:
            raise OutOfMemory("the process was stopped by the system") from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(first_sentence(error)) from error


@contextmanager
def open_probe(recipe: Recipe, classes: int, steps: int) -> Iterator[Probe]:
    """A probe whose process ends with the block."""
    probe = Probe(recipe, classes, steps)
    try:
        yield probe
    finally:
        probe.process.shutdown(cancel_futures=True)


def run_steps(recipe: Recipe, classes: int, images: int, steps: int, threads: int) -> StepCost:
    """What `Probe.measure` runs: forward, backward, optimiser and average, as `fit` does them, on random images."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    recipe = replace(recipe, lr=1e-6 if recipe.lr == AUTO else recipe.lr)  # the cost does not depend on it
    classifier = build(recipe, tuple(map(str, range(classes))))
    state = TrainState(
        classifier.model, make_optimizer(classifier.model, recipe), recipe.ema, keep_best=recipe.patience > 0
    )
    mixing = BatchMixing(recipe, classes)
    pixels = torch.randint(256, (images, recipe.in_chans, *classifier.preprocess.img_size), dtype=torch.uint8)
    labels = torch.randint(classes, (images,), device=classifier.device)
    times = []
    for step in range(steps):
        start = perf_counter()
        seed_step(recipe.seed, step)
        inputs, targets = mixing(classifier.to_input(pixels), labels)
        train_once(state, inputs, targets, recipe.accumulate, recipe.clip_grad, recipe.precision)
        if classifier.device.type == "cuda":
            torch.cuda.synchronize(classifier.device)
        times.append(perf_counter() - start)
    return StepCost(
        images=images,
        seconds=statistics.median(times[1:] or times),
        peak_memory_mb=peak_memory_mb(classifier.device),
        checkpoint_mb=checkpoint_bytes(state) / 2**20,
        img_size=classifier.preprocess.img_size,
    )


def checkpoint_bytes(state: TrainState) -> int:
    """Bytes of the tensors that a state saves."""
    moments = [value for group in state.optimizer.state.values() for value in group.values()]
    weights = list(state.model.state_dict().values())
    copies = 1 + (state.average is not None) + (state.best is not None)
    return copies * sum(tensor.nbytes for tensor in weights) + sum(
        value.nbytes for value in moments if isinstance(value, Tensor)
    )


def train_once(
    state: TrainState, inputs: Tensor, targets: Tensor, accumulate: int, clip_grad: float, precision: Precision
) -> None:
    """A step of the cost that the loop's has, with none of its bookkeeping."""
    state.model.train()
    for part, part_targets in zip(inputs.chunk(accumulate), targets.chunk(accumulate), strict=True):
        with autocast(inputs.device, precision):
            logits = state.model(part)
        F.cross_entropy(logits.float(), part_targets).backward()  # type: ignore[no-untyped-call]
    if clip_grad:
        nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.update_average()
