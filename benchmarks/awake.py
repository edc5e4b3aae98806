"""What either side of a fused model is worth, with and without branch dropout: CIFAR-10, from random weights.

    python benchmarks/awake.py CIFAR10/train.parquet --runs runs/awake --out benchmarks/results/awake.json

Expected before it was run: with branch dropout the patches are worth at least a point where they are worth nothing
today, and accuracy falls by less than a point.

`--images` training images, and as many to judge by as `--held-out`, both of the training file: choices are made on
none of the test images. A side is worth what accuracy is lost when its tokens are replaced by their mean, in all
layers (`analyze tokens`). Seeds share the images; they differ in weights, order and augmentation. Every row is an
ordinary run folder in `--runs`; the program goes on where it was.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from common import environment, train_on
from tokenfusion.analyze.tokens import analyze_tokens
from tokenfusion.compare.results import sides_of_run
from tokenfusion.evaluate import evaluate
from tokenfusion.files import write_json
from tokenfusion.json_files import read_json
from tokenfusion.metrics import t_interval
from tokenfusion.recipe import Recipe, load_recipe

MODELS = ("tokenfusion_early_micro", "tokenfusion_layerwise_micro", "tokenfusion_late_micro")
RECIPE = Path(__file__).parents[1] / "recipes" / "cifar10_comparison.toml"


def cut(source: Path, folder: Path, images: int, held_out: int) -> Path:
    """The file's first images to train on, and its last to judge by, as a folder of Parquet."""
    table = pq.read_table(source)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", table.slice(0, images)), ("validation", table.slice(len(table) - held_out))):
        pq.write_table(part, folder / f"{name}.parquet")
    return folder.resolve()


def run_one(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train, judge and analyse a run, or read what was found of it."""
    train_on(recipe, folder, Console(quiet=True))
    if not (folder / "evaluation.json").exists():
        evaluate(folder)
    if not (folder / "tokens" / "tokens.json").exists():
        analyze_tokens(str(folder), num_images=2000)
    sides = {side["tokens"]: side for side in sides_of_run(folder)}
    return {"top1": read_json(folder / "evaluation.json", "evaluate it anew")["top1"], "sides": sides}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds with their intervals."""
    values = {"top1": [run["top1"] for run in runs]}
    values |= {f"lost without {side}": [run["sides"][side]["lost"] for run in runs] for side in runs[0]["sides"]}
    return {name: {"mean": fmean(of), "ci95": t_interval(of), "seeds": of} for name, of in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CIFAR-10's train.parquet")
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.2, 0.5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--held-out", type=int, default=5_000)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    given = parser.parse_args()
    result = environment() | {name: getattr(given, name) for name in ("epochs", "images", "held_out")}
    usual = Recipe(**load_recipe(RECIPE))
    data = cut(given.data, given.runs / "data", given.images, given.held_out)
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for seed, model, rate in product(range(given.seeds), given.models, given.rates):
        recipe = replace(usual, data=str(data), model=model, seed=seed, epochs=given.epochs, branch_dropout=rate)
        run = run_one(recipe, given.runs / f"{model}-{rate:g}-seed{seed}")
        found.setdefault((model, rate), []).append(run)
        worth = {side: round(of["lost"], 4) for side, of in run["sides"].items()}
        print(seed, model, rate, run["top1"], worth, flush=True)
        rows = [{"model": model, "branch_dropout": rate} | summary(runs) for (model, rate), runs in found.items()]
        write_json(given.out, result | {"rows": rows})


if __name__ == "__main__":
    main()
