"""The report of a run: what it reached, where it errs, what it cost."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenfusion.data.dataset import printable
from tokenfusion.formatting import counted, duration
from tokenfusion.metrics import reliability, wilson_interval
from tokenfusion.report.multilabel import multilabel_values
from tokenfusion.report.page import MAX_MISTAKES, Picture, Thumbnails, percent, picture, pictures_of, write_page
from tokenfusion.report.pictures import Overlay, overlays_of
from tokenfusion.report.run_folder import PredictionRow, Results, read_results

MAX_CONFUSED = 30
"""Classes that the confusion matrix shows at most."""
MAX_SKIPPED = 200
"""Skipped images that are listed at most."""


@dataclass(frozen=True)
class ClassRow:
    """A line of the per-class table."""

    name: str
    n: int
    right: int
    recall: float | None
    low: float
    high: float
    precision: float | None
    f1: float | None


@dataclass(frozen=True)
class Heatmap:
    """The confusion matrix, or its most confused part."""

    names: list[str]
    total: int
    """Classes before the choice."""
    rows: list[list[tuple[int, float]]]
    """Count of each cell and its share of the true class's images."""


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction and its picture."""

    prediction: PredictionRow
    picture: Picture
    overlays: list[tuple[str, str]]
    """Where the model looked: what the picture is, and its data: address."""


def write_report(run: Path, thumbnails: Thumbnails | None = None) -> Path:
    """Write `report.html` into a run folder, whole or not at all.

    Args:
        run: the folder that training wrote; without an evaluation the report says how to make one and shows the rest.
        thumbnails: called once, with the images to show; without it the mistakes are listed without pictures.

    Returns:
        The path of the report.

    Raises:
        InputError: the folder is not a run, is incomplete or damaged, or is of a newer version.
    """
    path = run / "report.html"
    results = read_results(run)
    template = "multilabel.html" if results.model["multi_label"] else "report.html"
    write_page(path, template, run_values(results, thumbnails))
    return path


def run_values(results: Results, thumbnails: Thumbnails | None) -> dict[str, Any]:
    """What the template tells."""
    from tokenfusion.report.plots import plot_curves, plot_lr_range, plot_reliability

    values: dict[str, Any] = {
        "results": results,
        "curves": plot_curves(results.epochs),
        "lr_range": results.lr_range and plot_lr_range(results.lr_range),
        "cost": list_cost(results),
        "skipped": results.skipped[:MAX_SKIPPED],
        "no_picture": "the image cannot be read any more" if thumbnails else "pictures were not asked for",
    }
    if results.model["multi_label"]:
        judged = judged_on(results.recipe.data, results.evaluation) if results.evaluation else ""
        return values | multilabel_values(results, judged, thumbnails)
    values["summary"] = run_summary(results)
    if results.evaluation is not None:
        scores = [p.score for p in results.predictions]
        correct = [p.label == p.prediction for p in results.predictions]
        values |= {
            "judged_on": judged_on(results.recipe.data, results.evaluation),
            "classes": list_classes(results.evaluation),
            "heatmap": draw_heatmap(results.model["classes"], np.array(results.evaluation["confusion"])),
            "reliability": plot_reliability(reliability(scores, correct)),
            "wrong": correct.count(False),
            "mistakes": show_mistakes(results.predictions, thumbnails, overlays_of(results.run)),
        }
    return values


def run_summary(results: Results) -> str:
    """The result in a few sentences."""
    name, epochs, evaluation = results.model["name"], results.epochs, results.evaluation
    trained = f"{name} was trained for {counted(len(epochs), 'epoch')} on {results.recipe.data}"
    if evaluation is None:
        held_out = percent(epochs[-1]["val_top1"], 2)
        return (
            f"{trained}. It has not been evaluated; on the held-out images its last epoch reached {held_out} accuracy."
        )
    n, (low, high) = evaluation["n"], evaluation["top1_ci95"]
    rows = [row for row in list_classes(evaluation) if row.n]
    right = sum(row.right for row in rows)
    sentences = [
        f"{trained}, and judged on {counted(n, 'image')}: {judged_on(results.recipe.data, evaluation)}.",
        f"It named {right} of them correctly: {percent(evaluation['top1'], 2)}.",
        f"On other images like these, expect between {percent(low)} and {percent(high)} (95% interval).",
    ]
    if right < n:
        worst = min(rows, key=lambda row: row.right / row.n)
        truth, taken, count = commonest_confusion(np.array(evaluation["confusion"]))
        names = results.model["classes"]
        sentences += [
            f"It finds “{worst.name}” least often, {worst.right} of {worst.n} times.",
            f"Its commonest mistake is to take “{names[truth]}” for “{names[taken]}”: {counted(count, 'time')}.",
        ]
    gap = float(np.mean([p.score for p in results.predictions])) - evaluation["top1"]
    sentences.append(
        f"The confidence that it states is off by {evaluation['ece'] * 100:.1f} percentage points on average, "
        f"on the whole too {'high' if gap > 0 else 'low'}."
    )
    if evaluation["skipped"]:
        sentences.append(f"{counted(evaluation['skipped'], 'image')} could not be read and are not counted.")
    return " ".join(sentences)


def judged_on(trained_on: str, evaluation: dict[str, Any]) -> str:
    """Which images an evaluation is of, and whether they are what the model was trained on."""
    split, data = evaluation["split"], evaluation["data"]
    images = f"all images of {data}" if split == "all" else f"the {split} split of {data}"
    if data != trained_on:
        return f"{images}, which is other data than it was trained on"
    return f"{images}, the very images it was trained on" if split in ("train", "all") else images


def commonest_confusion(confusion: NDArray[np.int64]) -> tuple[int, int, int]:
    """True class, predicted class and count of the commonest mistake."""
    mistakes = confusion - np.diag(np.diag(confusion))
    truth, taken = divmod(int(mistakes.argmax()), len(confusion))
    return truth, taken, int(mistakes[truth, taken])


def list_classes(evaluation: dict[str, Any]) -> list[ClassRow]:
    """The per-class table, in the order of the classes."""
    rows = []
    for i, (name, scores) in enumerate(evaluation["per_class"].items()):
        right, n = evaluation["confusion"][i][i], scores["n"]
        low, high = wilson_interval(right, n)
        rows.append(ClassRow(name, n, right, scores["recall"], low, high, scores["precision"], scores["f1"]))
    return rows


def draw_heatmap(classes: list[str], confusion: NDArray[np.int64], limit: int = MAX_CONFUSED) -> Heatmap:
    """The confusion matrix of the classes that take part in most mistakes, in the order of the classes.

    Args:
        classes: K names.
        confusion: (K, K) counts, rows truth.
        limit: classes to keep.
    """
    mistakes = confusion.sum(0) + confusion.sum(1) - 2 * np.diag(confusion)
    chosen = np.sort(np.argsort(-mistakes, kind="stable")[:limit])
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    cells = [[(int(confusion[i, j]), float(shares[i, j])) for j in chosen] for i in chosen]
    return Heatmap(names=[classes[i] for i in chosen], total=len(classes), rows=cells)


def worst_mistakes(predictions: list[PredictionRow]) -> list[PredictionRow]:
    """The mistakes made with most confidence, the most confident first."""
    wrong = [p for p in predictions if p.label != p.prediction]
    return sorted(wrong, key=lambda p: (-p.score, p.path))[:MAX_MISTAKES]


def show_mistakes(
    predictions: list[PredictionRow], thumbnails: Thumbnails | None, overlays: dict[tuple[str, str], list[Overlay]]
) -> list[Mistake]:
    """The worst mistakes with their pictures."""
    worst = worst_mistakes(predictions)
    mistakes = []
    for p, shown in zip(worst, pictures_of([p.path for p in worst], thumbnails), strict=True):
        drawn = [(of.caption, picture(of.png)[0]) for of in overlays.get((printable(p.path), p.prediction), [])]
        mistakes.append(Mistake(p, shown, drawn))
    return mistakes


def list_cost(results: Results) -> list[tuple[str, str]]:
    """What the run cost, as names and values."""
    epochs, planned, model = results.epochs, results.recipe.epochs, results.model
    seconds = sum(epoch["seconds"] for epoch in epochs)
    memory = [epoch["peak_memory_mb"] for epoch in epochs if epoch.get("peak_memory_mb") is not None]
    return [
        ("Training time", f"{duration(seconds)}, {duration(seconds / len(epochs))} per epoch"),
        ("Epochs", str(len(epochs)) + f" of {planned}" * (planned != "auto")),
        ("Speed", f"{median(epoch['images_per_s'] for epoch in epochs):,.0f} images/s (median epoch)"),
        ("Peak memory", f"{max(memory):,.0f} MB" if memory else "not measured"),
        ("Parameters", f"{model['parameters']:,}"),
        ("Multiply-adds (MACs) per image", f"{model['macs'] / 1e6:,.1f} M"),
        ("Hardware", model["hardware"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in model["versions"].items())),
    ]
