"""The operators that a preset could have, with open gates: what the choice in `models/presets.py` rests on.

    python benchmarks/operators.py CIFAR10 --runs runs/comparison/runs --out benchmarks/results/operators.json

Every cell is trained by one recipe, on one thread, and is an ordinary run folder in `--runs`: killed and started again,
the program goes on there, and a comparison's runs of the presets by the same recipe count.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from common import describe, train_on
from tokenfusion.compare.contenders import slug
from tokenfusion.evaluate import evaluate
from tokenfusion.files import write_json
from tokenfusion.models.presets import OPERATOR, VARIANTS
from tokenfusion.models.registration import register_variants
from tokenfusion.recipe import Recipe, load_recipe

CONTENDERS = ("layerwise_add", "layerwise_cls", "early_joint", "early_cross", "late_joint", "late_cls")
"""What was ahead in the comparison of every cell, beside what the presets have."""
RECIPE = Path(__file__).parents[1] / "recipes" / "cifar10_longer.toml"


def register() -> dict[str, str]:
    """Make the cells known by name; a cell that a preset has goes by the preset's."""
    names, variants = {}, {}
    for cell in CONTENDERS:
        strategy, operator = cell.split("_")
        preset = f"tokenfusion_{strategy}_micro"
        names[cell] = preset if OPERATOR[strategy] == operator else f"{cell}_micro"
        build, arguments = VARIANTS[preset]
        variants |= {} if names[cell] == preset else {names[cell]: (build, arguments | {"operator": operator})}
    register_variants(__name__, variants)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, anew after every run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe(**load_recipe(RECIPE), data=str(options.data.resolve()))
    result = describe() | {"recipe": asdict(recipe) | {"data": options.data.name}, "rows": []}
    rows = {cell: {"cell": cell, "model": name, "top1": {}} for cell, name in register().items()}
    for seed in range(options.seeds):
        for row in rows.values():
            run = options.runs / f"{slug(row['model'])}-seed{seed}"
            train_on(replace(recipe, model=row["model"], seed=seed), run, Console())
            if not (run / "evaluation.json").exists():
                evaluate(run)
            model = json.loads((run / "model.json").read_text())
            row |= {"parameters": model["parameters"], "macs": model["macs"]}
            row["top1"][str(seed)] = json.loads((run / "evaluation.json").read_text())["top1"]
            result["rows"] = [row for row in rows.values() if row["top1"]]
            write_json(options.out, result)


if __name__ == "__main__":
    main()
