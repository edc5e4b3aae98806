"""What the report of a run says of images with any number of classes."""

from dataclasses import dataclass
from typing import Any

from tokenfusion.formatting import counted
from tokenfusion.report.page import MAX_MISTAKES, Picture, Thumbnails, percent, pictures_of
from tokenfusion.report.run_folder import LabelSetRow, Results


@dataclass(frozen=True)
class LabelMistake:
    """An image some of whose classes are wrong, and its picture."""

    image: LabelSetRow
    missed: list[str]
    added: list[str]
    picture: Picture


def multilabel_values(results: Results, judged_on: str, thumbnails: Thumbnails | None) -> dict[str, Any]:
    """What the template `multilabel.html` tells besides that of any run.

    Args:
        results: of a multi-label run.
        judged_on: which images the evaluation is of.
        thumbnails: as in `write_report`.
    """
    values: dict[str, Any] = {"summary": multilabel_summary(results, judged_on)}
    if results.evaluation is not None:
        wrong = [image for image in results.label_sets if image.labels != image.predictions]
        values |= {"judged_on": judged_on, "wrong": len(wrong), "mistakes": worst_by_loss(wrong, thumbnails)}
    return values


def multilabel_summary(results: Results, judged_on: str) -> str:
    """The result in a few sentences."""
    name, epochs, evaluation = results.model["name"], results.epochs, results.evaluation
    trained = f"{name} was trained for {counted(len(epochs), 'epoch')} on {results.recipe.data}"
    if evaluation is None:
        held_out = percent(epochs[-1]["val_map"], 2)
        return f"{trained}. It has not been evaluated; on the held-out images its last epoch reached {held_out} mAP."
    sentences = [f"{trained}, and judged on {counted(evaluation['n'], 'image')}: {judged_on}."]
    if evaluation["map"] is None:
        return " ".join([*sentences, "None of these images has any of the classes, so that there is no mAP."])
    low, high = evaluation["map_ci95"]
    measured = {row: scores for row, scores in evaluation["per_class"].items() if scores["ap"] is not None}
    worst = min(measured, key=lambda row: measured[row]["ap"])
    sentences += [
        f"Its mean average precision (mAP) is {percent(evaluation['map'], 2)}.",
        f"On other images like these, expect between {percent(low)} and {percent(high)} (95% interval).",
        f"All classes are right in {percent(evaluation['exact_match'])} of the images.",
        f"It ranks “{worst}” worst: average precision {percent(measured[worst]['ap'])}.",
    ]
    if evaluation["cross_fitted"]:
        sentences.append(
            "The thresholds were tuned on these images; F1 and mistakes are therefore those of thresholds tuned on the "
            "other half of them."
        )
    if evaluation["skipped"]:
        sentences.append(f"{counted(evaluation['skipped'], 'image')} could not be read and are not counted.")
    return " ".join(sentences)


def worst_by_loss(wrong: list[LabelSetRow], thumbnails: Thumbnails | None) -> list[LabelMistake]:
    """The images with the largest loss among those with a wrong class, the largest first, with their pictures."""
    worst = sorted(wrong, key=lambda image: (-image.loss, image.path))[:MAX_MISTAKES]
    return [
        LabelMistake(
            image,
            [name for name in image.labels if name not in image.predictions],
            [name for name in image.predictions if name not in image.labels],
            shown,
        )
        for image, shown in zip(worst, pictures_of([image.path for image in worst], thumbnails), strict=True)
    ]
