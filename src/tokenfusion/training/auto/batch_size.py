"""The largest batch that fits into memory, by a process that trains a few steps on batches twice as large each time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log2

from tokenfusion.errors import InputError
from tokenfusion.hardware import available_mb, default_device
from tokenfusion.recipe import Recipe
from tokenfusion.training.auto.timing import measuring_process
from tokenfusion.training.recovery import OutOfMemory

SHARE = 0.8
"""Of the available memory, what a training step may take; the rest is for evaluation and the loader."""
MIN_STEPS = 20
"""Steps that an epoch keeps at least."""


def choose_batch_size(
    recipe: Recipe, classes: int, images: int, say: Callable[[str], None], memory_mb: float | None = None
) -> Recipe:
    """Double the batch while it fits into memory and leaves an epoch 20 steps.

    Args:
        recipe: its batch_size is auto.
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
    with measuring_process(replace(recipe, compile=False), classes, steps=2) as measure:  # else each size is compiled
        chosen, reason = largest_that_fits(lambda size: measure(size).grown_mb, sizes, memory_mb, say)
    if not chosen:
        raise InputError(f"batch_size=auto: {reason}; give a smaller --model or --img-size, or --grad-checkpointing")
    say(f"batch_size=auto: {chosen} is chosen; {reason}")
    return replace(recipe, batch_size=chosen)


def more_than_there_are(batch_size: int, images: int) -> str:
    """What there is to say of a batch that cannot be filled."""
    return f"each step takes all {images:,} training images, for batch_size={batch_size} is more than there are"


def largest_that_fits(
    measure: Callable[[int], float], sizes: Sequence[int], memory_mb: float, say: Callable[[str], None]
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
