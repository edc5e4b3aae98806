"""The report of a run: what it reached, where it errs, what it cost."""

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tokenfusion.checkpoint import load_description, weights_in_words
from tokenfusion.corruptions import corruption_table
from tokenfusion.data.dataset import printable
from tokenfusion.evaluate import images_in_words, of_groups
from tokenfusion.files import own_results, write_text
from tokenfusion.formatting import counted, duration
from tokenfusion.json_files import AGAIN, read_json
from tokenfusion.metrics import reliability, wilson_interval
from tokenfusion.report.confusion import commonest_confusion, draw_heatmap, headings, off_diagonal
from tokenfusion.report.page import MAX_MISTAKES, Thumbnails, percent, picture, pictures_of, write_page
from tokenfusion.report.parents import parents_of
from tokenfusion.report.pictures import overlays_of
from tokenfusion.report.run_folder import LabelSetRow, PredictionRow, Results, read_nearest, read_results

MAX_SKIPPED = 200
"""Skipped images that are listed at most, and excluded ones."""


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
    load_description(run)
    with own_results(run):
        results = read_results(run)
        template = "multilabel.html" if results.model["multi_label"] else "report.html"
        write_page(path, template, run_values(results, thumbnails))
    return path


def run_values(results: Results, thumbnails: Thumbnails | None) -> dict[str, Any]:
    """What the templates `report.html` and, of multi-label runs, `multilabel.html` name."""
    from tokenfusion.report.plots import (
        plot_corruptions,
        plot_curves,
        plot_lr_range,
        plot_reliability,
        plot_risk_coverage,
    )

    evaluation, multi_label = results.evaluation, results.model["multi_label"]
    values: dict[str, Any] = {
        "results": results,
        "summary": run_summary(results),
        "curves": plot_curves(results.epochs) if len(results.epochs) > 1 else [],
        "in_words": training_in_words(results),
        "lr_range": results.lr_range and plot_lr_range(results.lr_range),
        "cost": list_cost(results),
        "skipped": results.skipped[:MAX_SKIPPED],
        "excluded": [*results.excluded.items()][:MAX_SKIPPED],
        "no_picture": "the image cannot be read any more" if thumbnails else "pictures were not asked for",
    }
    if evaluation is None:
        return values
    values["others"] = list_others(results)
    values["judged_on"] = judged_on(results.recipe.data, evaluation)
    values["risk_coverage"] = (curves := risk_curves(evaluation)) and plot_risk_coverage(curves)
    values["of_groups"] = of_groups(evaluation)
    if multi_label:
        wrong = [row for row in results.label_sets if row.labels != row.predictions]
        return values | {"wrong": len(wrong), "mistakes": worst_by_loss(wrong, thumbnails)}
    scores = [row.score for row in results.predictions]
    correct = [row.label == row.prediction for row in results.predictions]
    return values | {
        "classes": list_classes(evaluation),
        "parents": parents_of(results),
        "heatmap": draw_heatmap(results.model["classes"], np.array(evaluation["confusion"])),
        "reliability": plot_reliability(reliability(scores, correct)),
        "corruptions": (found := evaluation.get("corruptions")) and plot_corruptions(found),
        "corruption_table": corruption_table(found) if found else [],
        "wrong": correct.count(False),
        "mistakes": show_mistakes(results, thumbnails),
    }


def write_figures(run: Path) -> list[str]:
    """Draw what `evaluation.json` has beside it: risk against coverage, and accuracy on worse images if it was judged.

    Returns:
        The files' names.
    """
    from tokenfusion.report.plots import plot_corruptions, plot_risk_coverage, standalone

    with own_results(run):
        evaluation = read_json(run / "evaluation.json", AGAIN)
        drawn = {"risk_coverage.svg": plot_risk_coverage(risk_curves(evaluation))}
        if found := evaluation.get("corruptions"):
            drawn["corruptions.svg"] = plot_corruptions(found)
        for name, figure in drawn.items():
            write_text(run / name, standalone(figure))
        if not found:
            (run / "corruptions.svg").unlink(missing_ok=True)  # of an evaluation before this one
    return [*drawn]


def risk_curves(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Risk against coverage by class, of images of one class under ""; nothing where an older version judged."""
    found = evaluation.get("risk_coverage", {})
    if evaluation.get("multi_label"):
        return dict(zip(headings([*found]), found.values(), strict=True))
    return {"": found} if found else {}


def run_summary(results: Results) -> str:
    """The result in a few sentences."""
    epochs, evaluation, multi_label = results.epochs, results.evaluation, results.model["multi_label"]
    name, data = results.model["name"], results.recipe.data
    trained = f"{name} was trained for {counted(len(epochs), 'epoch')} on {data}"
    if results.is_linear:
        trained = f"{name} is a linear classifier on what its pretrained parents see, fitted to {data}"
    if evaluation is None:
        key, metric = ("val_map", "mAP") if multi_label else ("val_top1", "accuracy")
        reached = f"{percent(epochs[-1][key], 2)} {metric}"
        who = "it" if results.is_linear else "its last epoch"
        return f"{trained}. It has not been evaluated; on the held-out images {who} reached {reached}."
    judged = f"judged on {counted(evaluation['n'], 'image')}: {judged_on(results.recipe.data, evaluation)}"
    sentences = [f"{trained}, and {judged}."]
    sentences += multilabel_sentences(evaluation) if multi_label else one_class_sentences(results, evaluation)
    if evaluation["skipped"]:
        sentences.append(f"{counted(evaluation['skipped'], 'image')} could not be read and are not counted.")
    return " ".join(sentences)


def training_in_words(results: Results) -> str:
    """What there is to say of a run that is too short to be drawn over its epochs; "" of others."""
    if len(results.epochs) > 1:
        return ""
    epoch = results.epochs[0]
    several = "val_map" in epoch
    training, held_out = ("train_exact_match", "val_map") if several else ("train_top1", "val_top1")
    right = "have all classes right" if several else "are named correctly"
    shares = (
        f"of the training images {percent(epoch[training])} {right}, "
        f"on the held-out images {'mAP' if several else 'accuracy'} is {percent(epoch[held_out])}"
    )
    how = "The linear classifier was fitted at once, without epochs" if results.is_linear else "There was one epoch"
    return f"{how}, so that there is no curve to draw: {shares}."


def one_class_sentences(results: Results, evaluation: dict[str, Any]) -> list[str]:
    """How good it is, where it errs most, and how far its confidence is off."""
    rows = [row for row in list_classes(evaluation) if row["n"]]
    right = sum(row["right"] for row in rows)
    sentences = [
        f"It named {right} of them correctly: {percent(evaluation['top1'], 2)}.",
        expectation(evaluation, "top1_ci95"),
    ]
    if right < evaluation["n"]:
        worst = min(rows, key=lambda row: row["right"] / row["n"])
        alike = sum(row["right"] * worst["n"] == worst["right"] * row["n"] for row in rows) - 1
        as_rarely = f", and {counted(alike, 'other class')} as rarely" * bool(alike)
        truth, taken, count = commonest_confusion(np.array(evaluation["confusion"]))
        names = results.model["classes"]
        others = int((off_diagonal(np.array(evaluation["confusion"])) == count).sum()) - 1
        as_common = f", as often as {counted(others, 'other mistake')}" * bool(others)
        sentences += [
            f"It finds “{worst['name']}” least often, {worst['right']} of {worst['n']} times{as_rarely}.",
            f"Its commonest mistake is to take “{names[truth]}” for “{names[taken]}”: "
            f"{counted(count, 'time')}{as_common}.",
        ]
    gap = float(np.mean([row.score for row in results.predictions])) - evaluation["top1"]
    sentences.append(
        f"The confidence that it states is off by {evaluation['ece'] * 100:.1f} percentage points on average, "
        f"on the whole too {'high' if gap > 0 else 'low'}."
    )
    return sentences


def multilabel_sentences(evaluation: dict[str, Any]) -> list[str]:
    """The same of images with any number of classes."""
    if evaluation["map"] is None:
        return ["None of these images has any of the classes, so that there is no mAP."]
    measured = {name: row["ap"] for name, row in evaluation["per_class"].items() if row["ap"] is not None}
    worst = min(measured, key=lambda name: measured[name])
    level = sum(ap == measured[worst] for ap in measured.values()) - 1
    as_badly = f", and {counted(level, 'other class')} as badly" * bool(level)
    sentences = [
        f"Its mean average precision (mAP) is {percent(evaluation['map'], 2)}.",
        expectation(evaluation, "map_ci95"),
        f"All classes are right in {percent(evaluation['exact_match'])} of the images.",
        f"It ranks “{worst}” worst: average precision {percent(measured[worst])}{as_badly}.",
    ]
    if evaluation["cross_fitted"]:
        sentences.append(
            "The thresholds were tuned on these images; F1 and mistakes are therefore those of thresholds tuned on the "
            "other half of them."
        )
    return sentences


def expectation(evaluation: dict[str, Any], key: str) -> str:
    """What a 95 % interval says."""
    low, high = evaluation[key]
    groups = of_groups(evaluation)
    return f"On other images like these, expect between {percent(low)} and {percent(high)} (95% interval{groups})."


def judged_on(trained_on: str, evaluation: dict[str, Any]) -> str:
    """Which images an evaluation is of, and whether they are what the model was trained on."""
    split, data, seen = evaluation["split"], evaluation["data"], evaluation.get("trained_on") or 0
    images = images_in_words(evaluation)
    met = ""
    if seen and evaluation["trained_on_left_out"]:
        met = f", without {counted(seen, 'image')} that it was trained on"
    elif seen:
        met = f", {seen:,} of which it was trained on"
    if not evaluation.get("own", data == trained_on):
        return f"{images}{met}" if met else f"{images}, which is other data than it was trained on"
    return f"{images}, the very images it was trained on" if split in ("train", "all") else f"{images}{met}"


def list_others(results: Results) -> list[tuple[str, int, str]]:
    """What was found on other images than those that the run holds out: which, how many, and the score."""
    rows = []
    for found in results.others:
        score, interval = ("map", "map_ci95") if results.model["multi_label"] else ("top1", "top1_ci95")
        low, high = found[interval] or (None, None)
        shown = f"{percent(found[score])} (95% interval {percent(low)} to {percent(high)})"
        rows.append((judged_on(results.recipe.data, found), found["n"], shown))
    return rows


def list_classes(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The per-class table, in the order of the classes: `name`, `right`, the scores, and recall's interval."""
    rows = []
    for i, (name, scores) in enumerate(evaluation["per_class"].items()):
        right = evaluation["confusion"][i][i]
        low, high = wilson_interval(right, scores["n"])
        rows.append({"name": name, "right": right, "low": low, "high": high} | scores)
    return rows


def worst_mistakes(predictions: list[PredictionRow]) -> list[PredictionRow]:
    """The mistakes made with most confidence, the most confident first."""
    wrong = [p for p in predictions if p.label != p.prediction]
    return sorted(wrong, key=lambda p: (-p.score, p.path))[:MAX_MISTAKES]


def show_mistakes(results: Results, thumbnails: Thumbnails | None) -> list[dict[str, Any]]:
    """The worst mistakes: `row`, `picture`, `overlays`, which are captions and data: addresses, and the `nearest`
    training images with their pictures, where the run noted them."""
    worst, overlays = worst_mistakes(results.predictions), overlays_of(results.run)
    pictures = pictures_of([row.path for row in worst], thumbnails)
    nearest = read_nearest(results.run)
    names = list(dict.fromkeys(other.path for row in worst for other in nearest.get(row.path, [])))
    known = dict(zip(names, pictures_of(names, thumbnails), strict=True))
    return [
        {
            "row": row,
            "picture": shown,
            "overlays": [(caption, picture(png)[0]) for caption, png in drawn],
            "nearest": [(other, *known[other.path]) for other in nearest.get(row.path, [])],
        }
        for row, shown in zip(worst, pictures, strict=True)
        for drawn in [overlays.get((printable(row.path), row.prediction), [])]
    ]


def worst_by_loss(wrong: list[LabelSetRow], thumbnails: Thumbnails | None) -> list[dict[str, Any]]:
    """The images with the largest loss among those with a wrong class: `row`, `picture`, `missed` and `added`."""
    worst = sorted(wrong, key=lambda row: (-row.loss, row.path))[:MAX_MISTAKES]
    return [
        {
            "row": row,
            "picture": shown,
            "missed": [name for name in row.labels if name not in row.predictions],
            "added": [name for name in row.predictions if name not in row.labels],
        }
        for row, shown in zip(worst, pictures_of([row.path for row in worst], thumbnails), strict=True)
    ]


def list_cost(results: Results) -> list[tuple[str, str]]:
    """What the run cost, as names and values."""
    epochs, planned, model = results.epochs, results.recipe.epochs, results.model
    memory = [epoch["peak_memory_mb"] for epoch in epochs if epoch.get("peak_memory_mb") is not None]
    began = [("Began with", weights_in_words(files))] if (files := model["began_with"]) else []
    return [
        *began,
        *list_times(results),
        *([] if results.is_linear else [("Epochs", str(len(epochs)) + f" of {planned}" * (planned != "auto"))]),
        ("Peak memory", f"{max(memory):,.0f} MB" if memory else "not measured"),
        ("Parameters", f"{model['parameters']:,}"),
        ("Multiply-adds (MACs) per image", f"{model['macs'] / 1e6:,.1f} M"),
        ("Hardware", model["hardware"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in model["versions"].items())),
    ]


TIMES = {
    "features": "both parents looking at the images",
    "fit": "fitting linear classifiers",
    "judging": "judging them",
    "fusion": "fusion",
    "fusion on trial": "trying fusion",
    "all": "fine-tuning",
    "all on trial": "trying fine-tuning",
}
"""What the parts of a run in stages are, by their names in times.json."""


def list_times(results: Results) -> list[tuple[str, str]]:
    """How long a run took, and with what: by its stages where it had some, else by its epochs."""
    epochs, times = results.epochs, results.times
    if times:
        parts = ", ".join(f"{TIMES.get(part, part)} {duration(took)}" for part, took in times["seconds"].items())
        guessed = [("Time estimated", f"about {duration(times['estimated'])}")] if "estimated" in times else []
        return [("Time taken", f"{duration(sum(times['seconds'].values()))}: {parts}"), *guessed]
    seconds = sum(epoch["seconds"] for epoch in epochs)
    return [
        ("Training time", f"{duration(seconds)}, {duration(seconds / len(epochs))} per epoch"),
        ("Speed", f"{median(epoch['images_per_s'] for epoch in epochs):,.0f} images/s (median epoch)"),
    ]
