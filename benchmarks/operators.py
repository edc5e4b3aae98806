"""The operators that a preset could have, with open gates: what the choice in `models/presets.py` rests on.

    python benchmarks/operators.py CIFAR10 --comparison runs/comparison --out benchmarks/results/cifar10_contenders.json

Every contender is trained by recipes/cifar10_comparison.toml, on one thread, and is an ordinary run folder beside those
of the comparison by that recipe, of which the presets' runs count: killed and started again, the program goes on there.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from common import train_on
from tokenfusion.compare import Budget, plan_comparison, summarise
from tokenfusion.evaluate import evaluate
from tokenfusion.files import write_json
from tokenfusion.models.presets import OPERATOR, VARIANTS
from tokenfusion.models.registration import register_variants
from tokenfusion.recipe import Recipe, load_recipe

CONTENDERS = ("layerwise_add", "layerwise_cls", "early_joint", "early_cross", "late_joint", "late_cls")
"""What was ahead in the comparison of every cell, beside what the presets have."""
RECIPE = Path(__file__).parents[1] / "recipes" / "cifar10_comparison.toml"


def register() -> list[str]:
    """Make the contenders known by name; one that a preset has goes by the preset's."""
    names, variants = [], {}
    for cell in CONTENDERS:
        strategy, operator = cell.split("_")
        preset = f"tokenfusion_{strategy}_micro"
        names.append(preset if OPERATOR[strategy] == operator else f"tokenfusion_{cell}_micro")
        build, arguments = VARIANTS[preset]
        variants |= {} if names[-1] == preset else {names[-1]: (build, arguments | {"operator": operator})}
    register_variants(__name__, variants)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of CIFAR-10's Parquet files")
    parser.add_argument(
        "--comparison", type=Path, required=True, help="what `tokenfusion compare --out` wrote, or will"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, anew after every run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = register()
    recipe = Recipe(**load_recipe(RECIPE), model=names[0], data=str(options.data.resolve()))
    budget = Budget("epochs", float(recipe.epochs))
    comparison = plan_comparison(recipe, names, options.seeds, options.comparison, budget)
    for seed in comparison.seeds:
        for name in names:
            run = comparison.run(name, seed)
            train_on(comparison.recipe_of(name, seed), run, Console())
            if not (run / "evaluation.json").exists():
                evaluate(run)
            result = summarise(replace(comparison, threads=1), {})
            result["data"] = result["recipe"]["data"] = options.data.name
            write_json(options.out, result)


if __name__ == "__main__":
    main()
