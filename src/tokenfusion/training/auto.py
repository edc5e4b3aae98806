"""What `auto` chooses before training begins: the batch size by a memory probe, the learning rate by a range test."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import log2
from pathlib import Path

from tokenfusion.data.loader import Batch, TrainLoader
from tokenfusion.errors import InputError
from tokenfusion.files import write_json
from tokenfusion.hardware import available_mb, default_device
from tokenfusion.recipe import AUTO, Recipe, dump_recipe
from tokenfusion.training.faults import BadStep, OutOfMemory
from tokenfusion.training.fit import Job, train_step
from tokenfusion.training.optimizer import make_optimizer
from tokenfusion.training.probe import open_probe
from tokenfusion.training.state import TrainState

Say = Callable[[str], None]

SHARE = 0.8
"""Of the available memory, what a training step may take; the rest is for evaluation and the loader."""
MIN_STEPS = 20
"""Steps that an epoch keeps at least."""

LR_RANGE = Path("lr_range.json")
"""Where a run folder keeps the curve of the range test."""
LOWEST, HIGHEST, STEPS = 1e-5, 1.0, 100
"""The range test's rates, and how many there are."""
SMOOTHING = 0.9
"""What the smoothed loss keeps of itself at each step."""
DIVERGED = 4.0
"""The range test ends where the smoothed loss is so many times its lowest."""
RULE = "a tenth of the rate at which the smoothed loss is lowest; range test, Smith 2017, arXiv 1506.01186"


def choose_batch_size(recipe: Recipe, classes: int, images: int, say: Say, memory_mb: float | None = None) -> Recipe:
    """Double the batch while it fits into memory and leaves an epoch 20 steps.

    Args:
        recipe: its batch_size is AUTO.
        classes, images: how many are trained on.
        say: told what was tried and what was chosen.
        memory_mb: MiB that may be taken; 80 % of what is available when not given.

    Returns:
        The recipe with a batch size.

    Raises:
        InputError: not even the smallest batch fits, or the available memory is not known.
    """
    if memory_mb is None:
        available = available_mb(default_device())
        if available is None:
            raise InputError("batch_size=auto needs /proc to know the available memory; give a number")
        memory_mb = SHARE * available
    smallest = max(8 // recipe.accumulate, 2) * recipe.accumulate
    doublings = int(log2(max(images / MIN_STEPS / smallest, 1)))
    sizes = [smallest * 2**doubling for doubling in range(doublings + 1)]
    with open_probe(replace(recipe, batch_size=0), classes, steps=2) as probe:

        def measure(size: int) -> float:
            return probe.measure(size).peak_memory_mb - probe.before_mb

        chosen, reason = largest_that_fits(measure, sizes, memory_mb, say)
    if not chosen:
        raise InputError(f"batch_size=auto: {reason}; give a smaller --model or --img-size, or --grad-checkpointing")
    say(f"batch_size=auto: {chosen} is chosen; {reason}")
    return replace(recipe, batch_size=chosen)


def more_than_there_are(batch_size: int, images: int) -> str:
    """What there is to say of a batch that cannot be filled."""
    return f"batch_size={batch_size} is more than the images there are: a step takes all {images:,}"


def largest_that_fits(
    measure: Callable[[int], float], sizes: Sequence[int], memory_mb: float, say: Say
) -> tuple[int, str]:
    """The last size before one that takes too much.

    A size that would take too much if memory grew on as it did is not tried: on a CPU the system may end any process
    when memory runs out.

    Args:
        measure: from a size to the MiB that it takes.
        sizes: to try, each twice the one before.
        memory_mb: MiB that may be taken.
        say: told what was measured.

    Returns:
        The size, or 0 where none fits, and why it is no larger one.
    """
    chosen, used = 0, [0.0]
    for size in sizes:
        expected = used[-1] + 2 * (used[-1] - used[-2]) if len(used) > 2 else 2 * used[-1]
        if expected > memory_mb:
            return chosen, f"{size} would take about {expected:,.0f} of {memory_mb:,.0f} MB"
        try:
            used.append(measure(size))
        except OutOfMemory as error:
            return chosen, f"{size} does not fit ({error})"
        if used[-1] > memory_mb:
            return chosen, f"{size} takes {used[-1]:,.0f} of {memory_mb:,.0f} MB"
        say(f"batch_size=auto: {size} takes {used[-1]:,.0f} of {memory_mb:,.0f} MB")
        chosen = size
    return chosen, f"{2 * chosen} would leave an epoch fewer than {MIN_STEPS} steps"


@dataclass(frozen=True)
class LrRange:
    """What a range test measured.

    Attributes:
        rates: the learning rate of each step.
        losses: before each step.
        smoothed: their running means, corrected for their start at 0.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    @property
    def chosen(self) -> float:
        """A tenth of the rate at which the smoothed loss is lowest, to two digits."""
        lowest = min(range(len(self.smoothed)), key=self.smoothed.__getitem__)
        return float(f"{self.rates[lowest] / 10:.1e}")


def choose_lr(job: Job, say: Say) -> Recipe:
    """Choose the peak learning rate by a range test, whose curve is written to the run folder.

    Args:
        job: its recipe's lr is AUTO; its model stays as it is.
        say: told what was chosen, and by which rule.

    Returns:
        The recipe with a learning rate.

    Raises:
        InputError: the loss does not fall at any rate.
    """
    tested = range_test(job)
    if not tested.losses or min(tested.smoothed) == tested.smoothed[0]:
        raise InputError(f"lr=auto: the loss fell at no rate from {LOWEST:g} to {HIGHEST:g}; give a number")
    record = {"chosen": tested.chosen, "rule": RULE, "smoothing": SMOOTHING}
    write_json(job.run / LR_RANGE, record | vars(tested))
    say(f"lr=auto: {tested.chosen:g} is chosen, {RULE}; the curve is in {job.run / LR_RANGE}")
    return replace(job.recipe, lr=tested.chosen)


def range_test(job: Job) -> LrRange:
    """Train a copy of the model for 100 steps at rates that rise exponentially, or until the loss diverges.

    Deterministic: the batches are those of the first epochs, and a step draws what the seed says.
    """
    rates = [LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1)) for step in range(STEPS)]
    model = copy.deepcopy(job.classifier.model)
    state = TrainState(model, make_optimizer(model, replace(job.recipe, lr=LOWEST)), ema=0.0, keep_best=False)
    tested, mean = LrRange([], [], []), 0.0
    for rate, batch in zip(rates, batches_of(job.loader), strict=False):
        recipe = replace(job.recipe, lr=rate, warmup_epochs=0.0, epochs=AUTO)  # an open end keeps the rate constant
        try:
            loss, _ = train_step(replace(job, recipe=recipe), state, *batch)
        except OutOfMemory as error:
            raise InputError(
                f"lr=auto: a batch does not fit into memory ({error}); give a smaller --batch-size or more --accumulate"
            ) from error
        except BadStep:  # the loss is not finite any more
            break
        state.progress.step += 1
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed = mean / (1 - SMOOTHING**state.progress.step)
        if tested.smoothed and not smoothed <= DIVERGED * min(tested.smoothed):
            break
        for numbers, number in ((tested.rates, rate), (tested.losses, loss), (tested.smoothed, smoothed)):
            numbers.append(number)
    return tested


def batches_of(loader: TrainLoader) -> Iterator[Batch]:
    """Batches of one epoch after another, without end."""
    for epoch in count():
        yield from loader.epoch(epoch)


def dump_chosen(recipe: Recipe, asked: Recipe) -> str:
    """A recipe as TOML, with a first line that says which of its numbers were chosen by measuring."""
    chosen = ", ".join(name for name in asked.autos if name not in recipe.autos)
    return f"# Chosen by measuring: {chosen}.\n{dump_recipe(recipe)}"
