"""Plan an ImageNet run on 8, 64 and 512 GPUs: hours, what is sent, and the CPU cores that load the images.

    python benchmarks/scaling_plan.py --out benchmarks/results/scaling_plan.json
    tokenfusion train IMAGENET --recipe RECIPE --batch-size SHARE --dry-run --json > share.json    # on your GPU
    python benchmarks/scaling_plan.py --measured share.json --out benchmarks/results/scaling_plan.json

With `--measured`, the seconds of a step are those of the dry runs given, each of one GPU's share. Without, they are
assumed: a training step takes three forward passes' multiply-adds, and a GPU does UTILISATION of its peak. On top of
either comes what the path of several processes costs a single one, of benchmarks/results/distributed.json. What is
sent is counted: in a ring of n processes each sends 2 (n - 1) / n of the gradients' bytes, at `--gbit` a second, and
nothing of it is hidden behind the backward pass, so that the hours are the most that sending makes of them. The
loader's rate is the one of benchmarks/results/loader.json, decoding included, for each of its workers. The recipe's
batch is kept: what a larger one would do to accuracy is another question.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import environment
from tokenfusion.files import write_json
from tokenfusion.models import create_model
from tokenfusion.models.cost import count_macs
from tokenfusion.recipe import Recipe, load_recipe

IMAGES, CLASSES = 1_281_167, 1000
GPUS = (8, 64, 512)
UTILISATION = 0.3
"""Of the peak, where nothing was measured: an assumption."""
ROOT = Path(__file__).parents[1]
RECIPES = ("cmt_s", "crossvit_15", "crossvit_18", "deepvit_16", "deepvit_32", "tokenfusion_small")


def loader_rate() -> float:
    """Images of 224 px that a worker decodes and augments in a second."""
    sizes = json.loads((ROOT / "benchmarks" / "results" / "loader.json").read_text())["results"]
    size = next(size for size in sizes if size["size"] == 224)
    return size["images_per_second"]["ours_decoding"] / max(size["workers"], 1)


def overhead() -> float:
    """What the path of several processes costs a single one, as a share of its step."""
    return json.loads((ROOT / "benchmarks" / "results" / "distributed.json").read_text())["overhead_on_one_process"]


def plan(recipe: Recipe, gpus: int, measured: dict[str, Any] | None, options: argparse.Namespace) -> dict[str, Any]:
    """What a recipe takes on so many GPUs."""
    share = recipe.batch_size / gpus
    model = create_model(recipe.model, num_classes=CLASSES)
    bytes_sent = 2 * (gpus - 1) / gpus * 4 * sum(weights.numel() for weights in model.parameters())
    if measured:
        compute = measured["step_seconds"] * share / (measured["batch_size"] / measured["processes"])
    else:
        compute = 3 * 2 * count_macs(recipe.model) * share / (options.peak_tflops * 1e12 * UTILISATION)
    compute *= 1 + overhead()
    sending = bytes_sent * 8 / (options.gbit * 1e9)
    rate = recipe.batch_size / (compute + sending)
    return {
        "gpus": gpus,
        "images_of_a_gpu": share,
        "compute_seconds": compute,
        "mb_sent": bytes_sent / 1e6,
        "sending_seconds": sending,
        "images_per_second": rate,
        "hours": recipe.epochs * IMAGES / rate / 3600,
        "efficiency": compute / (compute + sending),
        "loader_cores_of_a_gpu": rate / gpus / loader_rate(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, nargs="*", default=[], help="dry runs as JSON, of recipes' models")
    parser.add_argument("--peak-tflops", type=float, default=312.0, help="dense bf16 peak of a GPU; an A100's, NVIDIA")
    parser.add_argument("--gbit", type=float, default=100.0, help="Gbit/s that each GPU can send to the next")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    options = parser.parse_args()
    measured = {run["model"]: run for run in (json.loads(path.read_text()) for path in options.measured)}
    result = environment() | {"peak_tflops": options.peak_tflops, "utilisation": UTILISATION, "gbit": options.gbit}
    result |= {"images": IMAGES, "loader_images_per_s_of_a_worker": loader_rate(), "overhead": overhead(), "rows": []}
    for name in RECIPES:
        recipe = Recipe(**load_recipe(ROOT / "recipes" / f"imagenet_{name}.toml"))
        run = measured.get(recipe.model)
        step = {"measured_on": run["hardware"], "dry_run": run} if run else {"measured_on": None}
        plans = [plan(recipe, gpus, run, options) for gpus in GPUS]
        recipe_only = {key: asdict(recipe)[key] for key in ("model", "epochs", "batch_size")}
        result["rows"].append({"recipe": f"imagenet_{name}", **recipe_only, **step, "plans": plans})
    write_json(options.out, result)


if __name__ == "__main__":
    main()
