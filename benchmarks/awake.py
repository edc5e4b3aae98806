"""What either side of a fused model is worth, trained in several ways (arms): CIFAR-10, from random weights.

    python benchmarks/awake.py CIFAR10/train.parquet --runs runs/awake --out benchmarks/results/awake.json

A side is worth what accuracy is lost when its tokens are replaced by their mean, in all layers, as `analyze tokens`
does it. `ARMS` says what each arm changes and what was expected of it before it was run.

`--images` training images, and as many to judge by as `--held-out`, both of the training file: choices are made on
none of the test images. Seeds share the images; they differ in weights, order and augmentation. Every run is an
ordinary run folder in `--runs`; the JSON is of all that are finished there and is written as each ends, so that the
program goes on where it was, and takes further arms and seeds at any time.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from common import environment, train_on
from tokenfusion.analyze.ablation import all_logits, replaced, token_means, whole_branch
from tokenfusion.analyze.inputs import open_run_or_model
from tokenfusion.analyze.record import evaluating
from tokenfusion.analyze.tokens import PreparedBatches
from tokenfusion.compare.statistics import crossed_t, holm
from tokenfusion.errors import InputError
from tokenfusion.files import write_json
from tokenfusion.hardware import keep_freed_memory
from tokenfusion.json_files import read_json
from tokenfusion.metrics import t_interval
from tokenfusion.models.cost import count_costs
from tokenfusion.models.create import create_model
from tokenfusion.models.presets import CONFIG, VARIANTS, build_preset
from tokenfusion.models.registration import register_variants
from tokenfusion.models.token_fusion import TokenFusion
from tokenfusion.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        changes: in words.
        recipe: fields that differ from those of `RECIPE`.
        model: arguments that differ from those of the preset.
        conv_stem: whether convolutions make the patches.
        expected: points that the patches are worth more, and points of accuracy, at least; stated beforehand.
    """

    changes: str
    recipe: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    conv_stem: bool = False
    expected: tuple[float, float] | None = None


BASELINE = "as it is"
ARMS = {
    BASELINE: Arm("the preset and the recipe as they are"),
    "side loss": Arm(
        "`--side-loss 1`: a loss of each side alone, its weight falling to 0",
        recipe={"side_loss": 1.0},
        expected=(2.0, -0.5),
    ),
    "branch dropout": Arm(
        "`--branch-dropout 0.3`: images without patches, or without pixels",
        recipe={"branch_dropout": 0.3},
        expected=(1.0, -1.0),
    ),
    "patches of 4": Arm("patches of 4 pixels in the place of 8", model={"patch_size": 4}, expected=(1.0, 0.0)),
    "convolutional stem": Arm(
        "three 3×3 convolutions of stride 2 and a 1×1 make the patches (arXiv 2106.14881)",
        conv_stem=True,
        expected=(1.0, 0.0),
    ),
    "four blocks": Arm("four blocks of the transformer", model={"depth": 4}, expected=(0.5, 0.0)),
}
MODELS = ("tokenfusion_early_micro", "tokenfusion_layerwise_micro", "tokenfusion_late_micro")
RECIPE = Path(__file__).parents[1] / "recipes" / "cifar10_comparison.toml"
SIDES = ("patch", "pixel")
TESTED = ("lost without patch", "top1")
"""What an arm is compared by; the p-values of both, over all arms and models, are corrected together."""
FOUND = "sides.json"
Rights = dict[str, NDArray[np.bool_]]
"""Of each image, whether it is named correctly: with all tokens ("both"), and without those of each side."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CIFAR-10's train.parquet")
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=VARIANTS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--held-out", type=int, default=5_000)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    given = parser.parse_args()
    keep_freed_memory()
    budget = {name: getattr(given, name) for name in ("epochs", "images", "held_out")}
    require_budget(given.runs, budget)
    usual = Recipe(**load_recipe(RECIPE))
    data = cut(given.data, given.runs / "data", given.images, given.held_out)
    head = environment() | budget | {"arms": {name: vars(arm) for name, arm in ARMS.items()}}
    for seed, arm, model in product(range(given.seeds), given.arms, given.models):
        changes = {"model": registered(model, arm), "seed": seed, "epochs": given.epochs} | ARMS[arm].recipe
        run_one(replace(usual, data=str(data), **changes), given.runs, model, arm)
        write_json(given.out, head | summarise(given.runs))


def require_budget(runs: Path, budget: dict[str, int]) -> None:
    """Refuse runs of another budget, which would stand in one table with these."""
    path = runs / "budget.json"
    runs.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, budget)
    elif (begun := read_json(path, "give another --runs")) != budget:
        raise InputError(f"{runs} holds runs of {begun}, not of {budget}; give the same again, or another --runs")


def cut(source: Path, folder: Path, images: int, held_out: int) -> Path:
    """The file's first images to train on, and its last to judge by, as a folder of Parquet."""
    if not (folder / "validation.parquet").exists():
        table = pq.read_table(source)
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("train", table.slice(0, images)), ("validation", table.slice(len(table) - held_out))):
            pq.write_table(part, folder / f"{name}.parquet")
    return folder.resolve()


def registered(preset: str, arm: str) -> str:
    """The name of a preset with an arm's changes, which is known from now on; its own where there are none."""
    changed = ARMS[arm]
    if not changed.model and not changed.conv_stem:
        return preset
    name = f"{preset}_{arm.replace(' ', '_')}"
    build = build_with_conv_stem if changed.conv_stem else build_preset
    register_variants(__name__, {name: (build, VARIANTS[preset][1] | changed.model)}, configs={name: CONFIG})
    return name


def build_with_conv_stem(**config: Any) -> TokenFusion:
    """A preset whose patches are made by convolutions of stride 2, each of twice the width of the one before."""
    model = build_preset(**config)
    patches, dim, layers = model.vit.embed.patches, model.vit.dim, list[nn.Module]()  # type: ignore[attr-defined]
    widths = [dim // 4, dim // 2, dim]
    assert patches.stride[0] == 2 ** len(widths)
    for before, width in zip([patches.in_channels, *widths], widths, strict=False):
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    model.vit.embed.patches = nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))  # type: ignore[attr-defined]
    return model


def run_one(recipe: Recipe, runs: Path, model: str, arm: str) -> None:
    """Train a run and judge its sides, as far as that is not done."""
    folder = runs / f"{model}-{arm.replace(' ', '_')}-seed{recipe.seed}"
    train_on(recipe, folder, Console(quiet=True))
    if (folder / FOUND).exists():
        return
    rights = judge_sides(folder)
    texts = {name: "".join("01"[int(right)] for right in found) for name, found in rights.items()}
    own = {"model": model, "arm": arm, "seed": recipe.seed} | cost_of(recipe)
    write_json(folder / FOUND, own | {"rights": texts})
    worth = {side: round(float(np.mean(lost(rights, side))), 4) for side in SIDES}
    print(recipe.seed, model, arm, round(float(rights["both"].mean()), 4), worth, flush=True)


@torch.no_grad()
def judge_sides(folder: Path) -> Rights:
    """Which held-out images a run names correctly, as it is and without the tokens of either side."""
    held_out = read_json(folder.parent / "budget.json", "give another --runs")["held_out"]
    classifier, images = open_run_or_model(str(folder), None, held_out, None)
    model, batches = classifier.model, PreparedBatches(classifier, images)
    labels = torch.cat([labels for _, labels in batches])
    spans = {side: whole_branch(model, classifier.preprocess.img_size, side) for side in SIDES}
    with evaluating(model):
        means, logits = token_means(model, [span for some in spans.values() for span in some], batches)
        rights = {"both": logits.argmax(1) == labels}
        for side, some in spans.items():
            with replaced(model, {span: means[span] for span in some}):
                rights[side] = all_logits(model, batches).argmax(1) == labels
    return {name: right.numpy() for name, right in rights.items()}


def cost_of(recipe: Recipe) -> dict[str, int]:
    """Multiply-adds of an image's forward pass, in use and in training, where the patches may be asked once more."""
    with torch.device("meta"):
        model = create_model(recipe.model, num_classes=10)
        assert isinstance(model, TokenFusion)
        image = torch.empty(1, 3, *model.img_size)
        macs, alone = count_costs(model, image).macs, count_costs(model.vit, image).macs
    return {"macs": macs, "training_macs": macs + alone * bool(recipe.side_loss)}


def summarise(runs: Path) -> dict[str, Any]:
    """Rows and tests of all finished runs in a folder."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(runs.glob(f"*/{FOUND}")):
        run = read_json(path, "delete it, and the same command judges the run anew")
        groups.setdefault((run["model"], run["arm"]), []).append(run)
    order = {key: place for place, key in enumerate(product(MODELS, ARMS))}
    values = {key: values_of(groups[key]) for key in sorted(groups, key=lambda key: order.get(key, len(order)))}
    rows = [
        {"model": model, "arm": arm, "macs": groups[model, arm][0]["macs"]}
        | {"training_macs": groups[model, arm][0]["training_macs"]}
        | {"seeds": [run["seed"] for run in groups[model, arm]]}
        | {name: over_seeds(per_image.mean(1).tolist()) for name, per_image in found.items()}
        for (model, arm), found in values.items()
    ]
    tests = [
        {"model": model, "arm": arm, "measure": name} | compare(found[name], values[model, BASELINE][name])
        for (model, arm), found in values.items()
        if arm != BASELINE and (model, BASELINE) in values
        for name in TESTED
    ]
    for test, corrected in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = corrected
    return {"rows": rows, "tests": tests}


def values_of(runs: Sequence[dict[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """Accuracy, and what is lost without either side, of each seed and image: (seeds, images)."""
    rights = [{name: np.array(list(text)) == "1" for name, text in run["rights"].items()} for run in runs]
    values = {"top1": np.stack([right["both"].astype(float) for right in rights])}
    return values | {f"lost without {side}": np.stack([lost(right, side) for right in rights]) for side in SIDES}


def lost(rights: Rights, side: str) -> NDArray[np.float64]:
    """Of each image, 1 where it is lost without a side, -1 where it is gained, else 0."""
    return rights["both"].astype(float) - rights[side]


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """A mean over seeds with its interval."""
    return {"mean": fmean(values), "ci95": t_interval(values), "seeds": values}


def compare(values: NDArray[np.float64], reference: NDArray[np.float64]) -> dict[str, Any]:
    """An arm against the baseline, seeds and images both random; without an interval where either has one seed."""
    if min(len(values), len(reference)) < 2:
        difference = float(values.mean() - reference.mean())
        return {"difference_mean": difference, "ci95": None, "p": None, "method": "none, too few seeds"}
    per_image = (values.mean(0) - reference.mean(0)).tolist()
    return crossed_t(values.mean(1).tolist(), reference.mean(1).tolist(), per_image)


if __name__ == "__main__":
    main()
