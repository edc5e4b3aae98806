"""DeepViT's two plots at a small scale: does attention collapse with depth, and does Re-attention keep accuracy rising?

    python benchmarks/depth.py CIFAR10 --runs runs/depth --out benchmarks/results/depth.json

Narrow ViTs of each depth, with Re-attention in no block or in all and nothing else that differs, are trained by one
recipe on some images of CIFAR-10, on one thread, and evaluated on all of its test images; 256 of those are what the
collapse is measured on. Every model is a run folder in `--runs`: killed and started again, the program goes on there.

CIFAR10 is a folder with train.parquet and test.parquet in the Hugging Face layout.
"""

import argparse
import csv
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console

from common import environment, train_on
from tokenfusion import training
from tokenfusion.analyze.collapse import analyze_collapse
from tokenfusion.errors import InputError
from tokenfusion.evaluate import evaluate
from tokenfusion.files import write_atomic, write_json
from tokenfusion.history import read_history
from tokenfusion.intervals import tango_interval
from tokenfusion.models.deepvit import DeepViT
from tokenfusion.models.registration import register_variants
from tokenfusion.recipe import Recipe

WATCHED = 500
"""Training images that are held out to watch the training by; nothing is chosen by them, nor by the test images."""
LOOKED_AT = 256
"""Test images that the collapse is measured on."""
RECIPE = Recipe(batch_size=64, crop_scale=0.7, save_minutes=2.0)
VIT: dict[str, Any] = {"img_size": 32, "num_classes": 10, "patch_size": 4, "heads": 4}


def register(depths: list[int], dim: int) -> dict[str, tuple[int, bool]]:
    """Make the models known by name; gives the depth of each, and whether it re-attends."""
    models = {
        f"{'re_attention' if re_attends else 'attention'}_{depth}x{dim}": (depth, re_attends)
        for depth in depths
        for re_attends in (False, True)
    }
    variants = {
        name: (DeepViT, VIT | {"dim": dim, "depth": depth, "re_attention": depth if re_attends else 0})
        for name, (depth, re_attends) in models.items()
    }
    register_variants(__name__, variants)
    return models


def choose_subset(data: Path, images: int, folder: Path) -> None:
    """Write as many training images, equally many of each class and always the same, and others to watch by."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(data / "train.parquet")
    labels = table["label"].to_numpy()
    random = np.random.default_rng(0)
    by_class = [random.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    each, watched = images // len(by_class), WATCHED // len(by_class)
    if min(map(len, by_class)) < each + watched:
        raise InputError(f"--images {images} and {WATCHED} to watch by are more than the data has; give fewer")
    for name, part in (("train", slice(each)), ("val", slice(each, each + watched))):
        write_rows(folder / f"{name}.parquet", table.take(np.sort(np.concatenate([rows[part] for rows in by_class]))))


def write_rows(path: Path, rows: pa.Table) -> None:
    write_atomic(path, lambda temporary: pq.write_table(rows, temporary))


def measure(run: Path, data: Path) -> dict[str, Any]:
    """What one trained run reached, and how alike its blocks are."""
    evaluated, collapsed = run / "evaluation.json", run / "collapse" / "collapse.json"
    if not evaluated.exists():
        evaluate(run, str(data), "test")
    if not collapsed.exists():
        analyze_collapse(str(run), str(data), num_images=LOOKED_AT)
    evaluation, collapse = json.loads(evaluated.read_text()), json.loads(collapsed.read_text())
    epochs = read_history(run)
    model = json.loads((run / "model.json").read_text())
    group, blocks = collapse["groups"][0], collapse["blocks"]
    before = group["similarity_before_mixing"]
    return {
        "parameters": model["parameters"],
        "macs": model["macs"],
        "minutes": sum(epoch["seconds"] for epoch in epochs) / 60,
        "train_loss": epochs[-1]["train_loss"],
        **{key: evaluation[key] for key in ("n", "top1", "top1_ci95", "loss")},
        "neighbours": group["neighbours"],
        "neighbours_before_mixing": before and {k: np.diagonal(before, int(k)).tolist() for k in group["neighbours"]},
        "similar_blocks": len(group["similar_blocks"]),
        "share_of_similar_blocks": group["share_of_similar_blocks"],
        "head_similarity": [block["head_similarity"] for block in blocks],
        "token_similarity": [block["token_similarity"] for block in blocks],
        "share_of_uniform_entropy": [block["entropy"] / block["uniform_entropy"] for block in blocks],
    }


def differences(models: dict[str, tuple[int, bool]], seed: int, runs: Path) -> list[dict[str, Any]]:
    """How much more is right with Re-attention than without at each depth, and in deeper models than in others."""
    right = {kind: right_of(runs / f"{name}-seed{seed}") for name, kind in models.items()}
    pairs = [
        (one, other)
        for one in right
        for other in right
        if (one[0] > other[0] and one[1] == other[1]) or (one[0] == other[0] and one[1] > other[1])
    ]
    keys = ("depth", "re_attention")
    return [
        {"seed": seed, "of": dict(zip(keys, one, strict=True)), "above": dict(zip(keys, other, strict=True))}
        | tango_interval(right[one] - right[other])
        for one, other in pairs
    ]


def right_of(run: Path) -> torch.Tensor:
    """Whether each test image is named correctly, in order."""
    with (run / "predictions.csv").open(newline="") as file:
        return torch.tensor([float(row["label"] == row["prediction"]) for row in csv.DictReader(file)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24, 32])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--dim", type=int, default=48, help=f"width, of {VIT['heads']} heads")
    parser.add_argument("--images", type=int, default=10_000, help="training images, equally many of each class")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, anew after every run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    subset = options.runs / f"images-{options.images}"
    recipe = replace(RECIPE, epochs=options.epochs, data=str(subset))
    result = environment() | {"dim": options.dim, "epochs": options.epochs, "images": options.images, "model": VIT}
    result |= {"looked_at": LOOKED_AT, "recipe": asdict(recipe) | {"data": subset.name}, "rows": [], "differences": []}
    models = register(options.depths, options.dim)
    choose_subset(options.data, options.images, subset)
    for seed in range(options.seeds):
        done: dict[str, tuple[int, bool]] = {}
        for name, (depth, re_attends) in models.items():
            run = options.runs / f"{name}-seed{seed}"
            train_on(replace(recipe, model=name, seed=seed), run, Console())
            row = {"depth": depth, "re_attention": re_attends, "seed": seed, **measure(run, options.data)}
            result["rows"].append(row)
            done[name] = (depth, re_attends)
            before = [of for of in result["differences"] if of["seed"] != seed]
            result["differences"] = before + differences(done, seed, options.runs)
            write_json(options.out, result)
            similar = f"{row['similar_blocks']} of {depth} blocks similar"
            print(f"{name}, seed {seed}: top-1 {row['top1']:.2%}, {similar}, {row['minutes']:.1f} minutes", flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
    except training.Interrupted:
        sys.exit("stopped and saved; start again to go on")
