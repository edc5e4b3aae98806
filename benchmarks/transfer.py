"""Two trained parents, fused and trained on, against the same pair from random weights and against their ensemble.

    python benchmarks/transfer.py CIFAR10 --runs runs/comparison/runs --out benchmarks/results/transfer.json

Parents are trained by recipes/cifar10_comparison.toml, unless `--runs` has them from a comparison. A fused pair goes on
for `--epochs`; from random weights it gets as many epochs as make the multiply-adds of both parents' training and of
that, and so does the CNN alone, as wide as the first strategy's pair is costly. Every row is an ordinary run folder in
`--runs`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from rich.console import Console

from common import environment, train_on
from tokenfusion.compare.contenders import slug
from tokenfusion.compare.ensemble import evaluate_mean, is_up_to_date
from tokenfusion.evaluate import evaluate
from tokenfusion.files import write_json
from tokenfusion.metrics import t_interval
from tokenfusion.models.controls import controls_of
from tokenfusion.models.cost import count_macs
from tokenfusion.recipe import Recipe, load_recipe

CNN, VIT = "resnet_micro", "vit_micro"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="as `tokenfusion train` takes it")
    parser.add_argument(
        "--recipe", type=Path, default=Path(__file__).parents[1] / "recipes" / "cifar10_comparison.toml"
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders")
    parser.add_argument("--epochs", type=int, default=2, help="of a warm-started pair")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", default=["layerwise", "late"])
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    options = parser.parse_args()
    result = environment()  # before anything loads the machine
    recipe = Recipe(**load_recipe(options.recipe), data=str(options.data.resolve()))
    epochs = recipe.epochs
    macs = {name: count_macs(name) for name in (CNN, VIT)}
    rows: dict[str, dict] = {}

    def note(name: str, run: Path, trained: float, cost: int) -> None:
        row = rows.setdefault(name, {"name": name, "macs": cost, "training_macs_per_image": trained, "top1": []})
        row["top1"].append(json.loads((run / "evaluation.json").read_text())["top1"])

    def run(name: str, seed: int, count: int, suffix: str = "", parents: Sequence[Path] = ()) -> Path:
        folder = options.runs / f"{slug(name)}{suffix}-seed{seed}"
        warm = tuple(str(parent.resolve()) for parent in parents)
        train_on(replace(recipe, model=name, seed=seed, epochs=count, warm_start_from=warm), folder, Console())
        if not (folder / "evaluation.json").exists():
            evaluate(folder)
        return folder

    for seed in range(options.seeds):
        parents = [run(name, seed, epochs) for name in (CNN, VIT)]
        for name, folder in zip((CNN, VIT), parents, strict=True):
            note(name, folder, epochs * macs[name], macs[name])
        mean = options.runs / f"{slug(f'mean({CNN},{VIT})')}-seed{seed}"
        if not is_up_to_date(mean, parents):
            evaluate_mean(parents, mean)
        before = epochs * sum(macs.values())
        note(f"mean({CNN},{VIT})", mean, before, sum(macs.values()))
        for strategy in options.strategies:
            name = f"fuse({CNN},{VIT},{strategy})"
            cost = count_macs(name)
            warm = run(name, seed, options.epochs, "-warm", parents)
            note(f"{name}, from its trained parents", warm, before + options.epochs * cost, cost)
            equal = options.epochs + round(before / cost)
            scratch = run(name, seed, equal, f"-{equal}epochs")
            note(f"{name}, from random weights", scratch, equal * cost, cost)
        name = f"fuse({CNN},{VIT},{options.strategies[0]})"
        wide = controls_of(name, num_classes=10).wide_cnn
        equal, wide_cost = options.epochs + round(before / count_macs(name)), count_macs(wide)
        alone = run(wide, seed, equal, f"-{equal}epochs")
        note(f"{wide}, from random weights", alone, equal * wide_cost, wide_cost)
        for row in rows.values():
            interval = t_interval(row["top1"])
            row |= {"top1_mean": fmean(row["top1"]), "top1_ci95": list(interval) if interval else None}
        write_json(
            options.out,
            result
            | {"recipe": options.recipe.name, "parents_epochs": epochs, "warm_epochs": options.epochs}
            | {"rows": list(rows.values())},
        )


if __name__ == "__main__":
    main()
