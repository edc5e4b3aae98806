"""How much training each contender gets, and all else that is settled before the first run."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import torch

from tokenfusion.compare.contenders import Contender, Remark, choose_contenders, slug
from tokenfusion.data.dataset import held_out_name
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import choose_split
from tokenfusion.errors import InputError
from tokenfusion.models.cost import Counts, count_model
from tokenfusion.recipe import Recipe, load_recipe
from tokenfusion.training.identity import FREE_TO_CHANGE

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
            number = float(amount)
        except ValueError:
            number = 0.0
        if unit not in get_args(Unit) or not 0 < number < math.inf:
            raise InputError(f"budget={text!r} is not an amount; give epochs=10, minutes=15 or macs=1e15")
        if unit == "epochs" and not number.is_integer():
            raise InputError(f"budget={text!r} is not a whole number; try epochs={math.ceil(number)}")
        return cls(cast(Unit, unit), number)

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
        split: what the data's held-out part is called.
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
    split: str
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


def plan_comparison(
    recipe: Recipe,
    models: Sequence[str],
    seeds: int,
    out: Path,
    budget: Budget,
    *,
    controls: bool = False,
    jobs: int = 1,
) -> Comparison:
    """All that can be known without training; a budget in minutes leaves the epochs open.

    Args:
        recipe, models, seeds, out, budget, controls, jobs: as `compare` takes them.

    Raises:
        InputError: a name, the budget or the data cannot be used, or `out` holds runs of another recipe.
    """
    dataset = open_dataset(recipe.data, recipe.exclude, reading=recipe.reading)
    if dataset.multi_label:
        raise InputError(
            f"{dataset.where} has any number of classes an image; a comparison ranks models by the share of images "
            "that they name correctly, of one class each: train and evaluate the models one by one"
        )
    classes = len(dataset.classes)
    contenders, missing, notes = choose_contenders(models, recipe, classes, controls)
    task: dict[str, Any] = {"num_classes": classes, "in_chans": recipe.in_chans, "img_size": recipe.img_size or None}
    comparison = Comparison(
        out=out,
        recipe=recipe,
        contenders=contenders,
        seeds=tuple(range(recipe.seed, recipe.seed + seeds)),
        budget=budget,
        epochs={},
        counts={one.name: count_model(one.name, **task)[0] for one in contenders if not one.members},
        missing=missing,
        notes=notes,
        split=held_out_name(dataset) or "val",
        training_images=len(choose_split(dataset, recipe.val_fraction, recipe.seed, recipe.rare_classes).train),
        jobs=jobs,
        threads=max(torch.get_num_threads() // jobs, 1),
    )
    return comparison if budget.unit == "minutes" else with_epochs(comparison)


def with_epochs(comparison: Comparison) -> Comparison:
    """The comparison with the epochs that the budget pays for; minutes are measured.

    Raises:
        InputError: less than one epoch of a model, or none can be trained, or a run folder has another recipe.
    """
    if comparison.epochs:
        return comparison
    failed: dict[str, str] = {}
    if comparison.budget.unit == "epochs":
        costs = dict.fromkeys(comparison.counts, 1.0)
    elif comparison.budget.unit == "macs":
        costs = {name: float(one.macs * comparison.training_images) for name, one in comparison.counts.items()}
    else:
        from tokenfusion.compare.timing import minutes_of_epochs

        kept = comparison.out / "timing.json"
        costs, failed = minutes_of_epochs(comparison.trained, comparison.recipe, comparison.threads, kept)
        if not costs:
            raise InputError(next(iter(failed.values())))
    planned = replace(comparison, epochs=comparison.budget.epochs(costs), untrainable=failed)
    for name in planned.epochs:
        for seed in planned.seeds:
            require_same_recipe(planned.run(name, seed), planned.recipe_of(name, seed))
    return planned


def require_same_recipe(run: Path, wanted: Recipe) -> None:
    """Refuse a run folder whose recipe decides on another result than the one wanted here."""
    if not (run / "recipe.toml").exists():
        return
    written = Recipe(**load_recipe(run / "recipe.toml"))
    different = [
        f"{field.name}={getattr(written, field.name)!r} instead of {getattr(wanted, field.name)!r}"
        for field in dataclasses.fields(Recipe)
        if field.name not in FREE_TO_CHANGE and getattr(written, field.name) != getattr(wanted, field.name)
    ]
    if different:
        raise InputError(
            f"{run} is a run folder of another recipe ({', '.join(different[:3])}); "
            "put the options back, or give another --out"
        )
