"""Which images should choose the temperature: other held-out ones, or those that were trained on?

    python benchmarks/calibration.py RUN...

Adds to results/calibration.json, for each run, the calibration error on its held-out images of raw scores, by the
temperature of the other half of them, and by the temperature that its training images choose. What stands there of the
same data and model is replaced.
"""

import json
import sys
from pathlib import Path

from tokenfusion import Classifier, Recipe
from tokenfusion.calibrate import choose_temperature, cross_fitted_temperatures
from tokenfusion.evaluate import as_outputs, collect_logits, output_of_class
from tokenfusion.files import write_json
from tokenfusion.judged import read_own_part
from tokenfusion.metrics import evaluate_logits
from tokenfusion.recipe import load_recipe


def measure(run: Path) -> dict:
    """Calibration errors of a run with their intervals, and the temperatures."""
    classifier, recipe = Classifier.load(run), Recipe(**load_recipe(run / "recipe.toml"))
    found = {}
    for part, split in (("train", "train"), ("held out", None)):
        images, _, _ = read_own_part(run, recipe, split=split)
        logits, labels = collect_logits(classifier, images, workers=recipe.workers)
        to_output = output_of_class(images.dataset, classifier.classes)
        found[part] = logits, as_outputs(labels, to_output, len(classifier.classes))
    by_training, (logits, labels) = choose_temperature(*found["train"]), found["held out"]
    choices = {"none": 1.0, "other half": cross_fitted_temperatures(logits, labels), "training images": by_training}
    results = {name: evaluate_logits(logits, labels, classifier.classes, 0, t) for name, t in choices.items()}
    return {
        "data": Path(recipe.data).name,
        "model": recipe.model,
        "epochs": recipe.epochs,
        "held_out": len(labels),
        "temperature": classifier.temperature,
        "temperature_of_training_images": by_training,
        "ece": {name: [result["ece"], *result["ece_ci95"]] for name, result in results.items()},
    }


if __name__ == "__main__":
    path = Path(__file__).parent / "results" / "calibration.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    kept = {(run["data"], run["model"]): run for run in runs}
    for folder in sys.argv[1:]:
        found = measure(Path(folder))
        print(found)
        kept[found["data"], found["model"]] = found
        write_json(path, {"runs": list(kept.values())})
