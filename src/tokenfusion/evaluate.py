"""How good a trained run is, on images it has not seen."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenfusion.classifier import Classifier
from tokenfusion.data.images import Images, read_images
from tokenfusion.data.loader import eval_batches
from tokenfusion.data.sources import Source, held_out_name, open_source, resolved
from tokenfusion.data.split import read_split
from tokenfusion.errors import InputError
from tokenfusion.files import write_json, write_text
from tokenfusion.metrics import evaluate_logits
from tokenfusion.recipe import Recipe, load_recipe


def collect_logits(
    classifier: Classifier, images: Images, batch_size: int = 256, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and labels (N,) of all the images, in order; `workers` processes decode what is not in memory."""
    workers = 0 if images.cached else workers
    results = [
        (classifier.logits(batch), labels)
        for batch, labels in eval_batches(images, classifier.preprocess, batch_size=batch_size, workers=workers)
    ]
    return torch.cat([logits for logits, _ in results]), torch.cat([labels for _, labels in results])


def evaluate(
    run: Path, data: str | None = None, split: str | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Evaluate a run; write `evaluation.json`, and `predictions.csv` with a line per image.

    Args:
        run: a finished run folder.
        data: labelled images of the run's classes; the run's own held-out images when not given.
        split: "train", "val" or "test" of data that has such parts; by default val, else test, else everything.
        progress: called with (images read, images in all).

    Returns:
        What `evaluation.json` holds (see `metrics.evaluate_logits`), with `data`, `split` and the `unreadable` images.

    Raises:
        InputError: the run or the data cannot be used, or the data has classes that the model does not know.
    """
    classifier = Classifier.load(run)
    recipe = Recipe(**load_recipe(run / "recipe.toml"))
    own = not data or resolved(data) == resolved(recipe.data)
    data = recipe.data if not data or own else resolved(data)
    source = open_source(data)
    to_output = output_of_class(source, classifier.classes)
    name, indices = choose_images(source, run, own=own, split=split)
    images, skipped = read_images(
        source,
        indices,
        max_pixels=recipe.max_pixels,
        cache_bytes=recipe.cache_mb * 2**20,
        progress=progress,
        split=name,
    )
    if not len(images):
        raise InputError(f"none of the {len(indices)} images of {data} is readable; the first: {skipped[0].reason}")
    logits, labels = collect_logits(classifier, images, workers=recipe.workers)
    labels = to_output[labels]
    result = evaluate_logits(logits, labels, classifier.classes, skipped=len(skipped))
    unreadable = [{"path": image.path, "reason": image.reason} for image in skipped]
    result |= {"data": data, "split": name, "unreadable": unreadable}
    write_predictions(run / "predictions.csv", classifier.classes, images.names, labels, logits)
    write_json(run / "evaluation.json", result)
    return result


def output_of_class(source: Source, classes: Sequence[str]) -> Tensor:
    """For each of the data's labels, the model's output of that name.

    Raises:
        InputError: a class that the model does not know.
    """
    unknown = [name for name in source.classes if name not in classes]
    if unknown:
        raise InputError(
            f"the data has classes that the model does not know: {', '.join(map(repr, unknown[:5]))}; "
            f"it knows {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}; rename or remove those"
        )
    return torch.tensor([classes.index(name) for name in source.classes])


def choose_images(source: Source, run: Path, *, own: bool, split: str | None) -> tuple[str, np.ndarray]:
    """Which part of the data is evaluated: its name and its indices."""
    path = run / "split.csv"
    if own and path.exists():
        parts = read_split(path, source)
        name = split or "val"
        if name not in ("train", "val"):
            raise InputError(f"split={name!r} is not part of this run; choose train or val")
        return name, parts.train if name == "train" else parts.val
    name = split or held_out_name(source) or ""
    chosen = np.array([i for i, part in enumerate(source.splits) if not name or part == name], dtype=np.int64)
    if not len(chosen):
        there = ", ".join(sorted({part for part in source.splits if part})) or "no parts"
        raise InputError(f"split={name!r} is empty; the data has {there}")
    return name or "all", chosen


def write_predictions(path: Path, classes: Sequence[str], names: Sequence[str], labels: Tensor, logits: Tensor) -> None:
    """Write `path,label,prediction,score` for every image."""
    scores, predictions = logits.softmax(1).max(1)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "prediction", "score"])
    for name, label, prediction, score in zip(
        names, labels.tolist(), predictions.tolist(), scores.tolist(), strict=True
    ):
        writer.writerow([name, classes[label], classes[prediction], f"{score:.6f}"])
    write_text(path, text.getvalue())
