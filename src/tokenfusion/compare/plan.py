"""How much training each contender gets, and all else that is settled before the first run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self, cast, get_args

from tokenfusion.compare.contenders import Contender, Remark, slug
from tokenfusion.errors import InputError
from tokenfusion.models.cost import Counts
from tokenfusion.recipe import Recipe

Unit = Literal["epochs", "minutes", "macs"]


@dataclass(frozen=True)
class Budget:
    """How much training each model gets: the same number of epochs, minutes of training steps, or multiply-adds.

    Multiply-adds are those of the forward passes over the training images; the backward passes cost about twice as much
    again, for every model alike.
    """

    unit: Unit
    amount: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `epochs=10`, `minutes=15` or `macs=1e15`."""
        unit, _, amount = text.partition("=")
        try:
            budget = cls(cast(Unit, unit), float(amount))
        except ValueError:
            budget = cls(cast(Unit, unit), 0.0)
        if unit not in get_args(Unit) or not 0 < budget.amount < math.inf:
            raise InputError(f"budget={text!r} is not an amount; give epochs=10, minutes=15 or macs=1e15")
        if unit == "epochs" and not budget.amount.is_integer():
            raise InputError(f"budget={text!r} is not a whole number; try epochs={math.ceil(budget.amount)}")
        return budget

    def __str__(self) -> str:
        return f"{self.unit}={self.amount:.12g}"

    def epochs(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Whole epochs of each model.

        Args:
            costs: of one epoch of each model, in this budget's unit.

        Raises:
            InputError: it does not pay for one epoch of every model; the smallest that does is named.
        """
        dearest = max(costs, key=lambda name: costs[name])
        if self.amount < costs[dearest]:
            enough = f"{costs[dearest] * 1.001:.4g}"  # rounded, but not below the cost
            raise InputError(
                f"budget {self} is less than one epoch of {dearest}; the smallest that works is {self.unit}={enough}"
            )
        return {name: math.floor(self.amount / cost) for name, cost in costs.items()}


@dataclass(frozen=True)
class Comparison:
    """All that is settled before the first run.

    Attributes:
        out: folder that everything is written to.
        recipe: what all runs share; its model, seed and epochs are those of no run.
        contenders: in the order of the table.
        seeds: of each contender.
        budget: as it was given.
        epochs: of each model that is trained.
        counts: what an image costs each model that is trained.
        missing: controls that there are none of.
        notes: what is to be said of other controls.
        part: what the data's held-out part is called.
        training_images: how many there are.
        jobs: runs at once.
        threads: of each run.
        untrainable: models whose steps could not be timed, and why.
    """

    out: Path
    recipe: Recipe
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    budget: Budget
    epochs: Mapping[str, int]
    counts: Mapping[str, Counts]
    missing: Sequence[Remark]
    notes: Sequence[Remark]
    part: str
    training_images: int
    jobs: int
    threads: int
    untrainable: Mapping[str, str] = field(default_factory=dict)

    @property
    def trained(self) -> list[Contender]:
        return [contender for contender in self.contenders if not contender.members]

    @property
    def means(self) -> list[Contender]:
        return [contender for contender in self.contenders if contender.members]

    def run(self, name: str, seed: int) -> Path:
        """The run folder of a contender with a seed."""
        return self.out / "runs" / f"{slug(name)}-seed{seed}"

    def recipe_of(self, name: str, seed: int) -> Recipe:
        return replace(self.recipe, model=name, seed=seed, epochs=self.epochs[name])
