"""How long a training step takes a model on this machine, for budgets in minutes: measured once and kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenfusion.compare.contenders import Contender
from tokenfusion.errors import InputError
from tokenfusion.files import write_json
from tokenfusion.json_files import read_json
from tokenfusion.recipe import Recipe
from tokenfusion.training.auto.timing import epoch_minutes
from tokenfusion.training.identity import deciding_fields, fingerprint, first_recipe


def minutes_of_epochs(
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
    kept: dict[str, dict[str, Any]] = (
        read_json(path, "delete it, and the same command measures anew") if path.exists() else {}
    )
    failed: dict[str, str] = {}
    for model in models:
        own = replace(recipe, model=model.name, epochs=1, seed=0)
        fields = deciding_fields(own) | {"data": own.data}
        if not was_measured(kept.get(model.name, {}), own, fields):
            try:
                kept[model.name] = {"minutes": epoch_minutes(own, threads), "recipe": fields, "threads": threads}
            except InputError as error:
                failed[model.name] = str(error)
                continue
            write_json(path, kept)
    return {model.name: kept[model.name]["minutes"] for model in models if model.name not in failed}, failed


def was_measured(kept: dict[str, Any], recipe: Recipe, fields: dict[str, Any]) -> bool:
    """Whether what is kept of a model is of this recipe; what a recipe did not have then was as it is by default."""
    if "key" in kept:  # of a comparison that began when recipes were compared as Python printed them
        return bool(kept["key"] == fingerprint(first_recipe(recipe)))
    return "recipe" in kept and deciding_fields(Recipe()) | kept["recipe"] == fields
