"""The learning rate by a range test, before training begins."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

from tokenfusion.errors import InputError
from tokenfusion.files import write_json
from tokenfusion.recipe import Recipe
from tokenfusion.training.auto.timing import every_epoch
from tokenfusion.training.distributed.world import Requests
from tokenfusion.training.objective import asked
from tokenfusion.training.optimizer import make_optimizer
from tokenfusion.training.recovery import BadStep, OutOfMemory
from tokenfusion.training.setup import Setup
from tokenfusion.training.state import TrainState
from tokenfusion.training.step import train_step

LR_RANGE = Path("lr_range.json")
"""Where a run folder keeps the curve of the range test."""
LOWEST, HIGHEST, STEPS = 1e-5, 1.0, 100
"""The range test's rates, and how many there are."""
SMOOTHING = 0.9
"""What the smoothed loss keeps of itself at each step."""
DIVERGED = 4.0
"""The range test ends where the smoothed loss is so many times its lowest."""
RULE = "a tenth of the rate at which the smoothed loss is lowest; range test, Smith 2017, arXiv 1506.01186"


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


def choose_lr(setup: Setup) -> Recipe:
    """Choose the peak learning rate by a range test, whose curve is written to the run folder.

    Args:
        setup: its recipe's lr is auto; its model stays as it is.

    Returns:
        The recipe with a learning rate.

    Raises:
        InputError: the loss does not fall at any rate.
    """
    tested = range_test(setup)
    if not tested.losses or min(tested.smoothed) == tested.smoothed[0]:
        raise InputError(f"lr=auto: the loss fell at no rate from {LOWEST:g} to {HIGHEST:g}; give a number")
    record = {"chosen": tested.chosen, "rule": RULE, "smoothing": SMOOTHING}
    write_json(setup.run.folder / LR_RANGE, record | vars(tested))
    setup.run.say(f"lr=auto: {tested.chosen:g} is chosen, {RULE}; the curve is in {setup.run.folder / LR_RANGE}")
    return replace(setup.recipe, lr=tested.chosen)


def range_test(setup: Setup) -> LrRange:
    """Train a copy of the model for 100 steps at rates that rise exponentially, or until the loss diverges.

    Deterministic: the batches are those of the first epochs, and a step draws what the seed says.
    """
    rates = [LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1)) for step in range(STEPS)]
    model = copy.deepcopy(setup.classifier.model)
    optimizer = make_optimizer(model, replace(setup.recipe, lr=LOWEST))
    state = TrainState(model, optimizer, ema=0.0, keep_best=False, network=asked(model, setup.recipe))
    tested, mean = LrRange([], [], []), 0.0
    for rate, batch in zip(rates, every_epoch(setup.batches), strict=False):
        recipe = replace(setup.recipe, lr=rate, warmup_epochs=0.0, epochs="auto")  # an open end keeps the rate constant
        try:
            loss, _ = train_step(replace(setup, recipe=recipe), state, batch, Requests())
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
