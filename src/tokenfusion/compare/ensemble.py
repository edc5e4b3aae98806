"""The mean of several runs' predictions on the same held-out images: the control that trains nothing."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenfusion.classifier import Classifier
from tokenfusion.evaluate import collect_logits, write_predictions
from tokenfusion.files import make_folder, own_results, write_json
from tokenfusion.judged import read_own_part
from tokenfusion.metrics import evaluate_logits
from tokenfusion.recipe import Recipe, load_recipe


def mean_log_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Logarithm of the mean softmax (N, K), float64, of several models' logits (N, K)."""
    return torch.stack([one.double().log_softmax(1) for one in logits]).logsumexp(0) - math.log(len(logits))


def evaluate_mean(runs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Evaluate the mean of runs' softmax; write `evaluation.json` and `predictions.csv` as `evaluate` does.

    Args:
        runs: finished ones, of the same data and seed.
        out: folder to write to.

    Raises:
        InputError: a run cannot be used.
    """
    recipe = Recipe(**load_recipe(runs[0] / "recipe.toml"))
    images, skipped, split = read_own_part(runs[0], recipe)
    classes, groups = images.dataset.classes, images.dataset.groups
    several = [collect_logits(Classifier.load(run).packed(), images, workers=recipe.workers) for run in runs]
    logits, labels = mean_log_probabilities([logits for logits, _ in several]), several[0][1]
    result = evaluate_logits(logits, labels, classes, skipped=len(skipped), groups=groups)
    result |= {"own": True, "data": recipe.data, "split": split, "members": [run.name for run in runs]}
    make_folder(out)
    with own_results(out):
        write_predictions(out / "predictions.csv", classes, images.names, labels, logits.softmax(1), groups)
        write_json(out / "evaluation.json", result)
    return result


def is_up_to_date(out: Path, runs: Sequence[Path]) -> bool:
    """Whether what `evaluate_mean` wrote is younger than the weights that it is of."""
    written = out / "evaluation.json"
    if not written.exists():
        return False
    return all((run / "model.safetensors").stat().st_mtime_ns <= written.stat().st_mtime_ns for run in runs)
