"""Read what a run folder holds, and refuse what does not fit together."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar

from tokenfusion.checkpoint import load_description
from tokenfusion.data.decoded import Skipped, skipped_in
from tokenfusion.data.exclude import EXCLUDED, read_list, reasons_in
from tokenfusion.errors import InputError
from tokenfusion.evaluate import EVALUATIONS
from tokenfusion.files import read_csv
from tokenfusion.history import read_history
from tokenfusion.json_files import AGAIN, NUMBER, SHARE, Shape, damaged, read_json, require, require_shape
from tokenfusion.places import resume_command
from tokenfusion.recipe import Recipe, load_recipe
from tokenfusion.similar import KEPT, NEAREST, Neighbour

FieldTypes = Mapping[str, type | UnionType]
"""Fields of a JSON object, and what each is."""
RISK: Shape = {"coverage": [NUMBER], "risk": [NUMBER], "area": NUMBER}
CORRUPTED: dict[str, Shape] = {
    "level": str,
    "severity": NUMBER,
    "top1": NUMBER,
    "ci95": (NUMBER, NUMBER),
    "lost": {"mean": NUMBER, "ci95": list | None},
}
CORRUPTIONS: dict[str, Shape] = {
    "images": int,
    "top1": NUMBER,
    "top1_mean": NUMBER,
    "corruptions": {"*": {"unit": str, "levels": [CORRUPTED]}},
}
CLASS: dict[str, Shape] = {"precision": SHARE, "recall": SHARE, "f1": SHARE, "n": int}
EVALUATION: dict[str, Shape] = {"data": str, "split": str, "n": int, "loss": NUMBER, "skipped": int}
ONE_CLASS: dict[str, Shape] = {
    **EVALUATION,
    "top1": NUMBER,
    "top5": NUMBER,
    "top1_ci95": (NUMBER, NUMBER),
    "temperature": NUMBER,
    "ece": NUMBER,
    "ece_raw?": NUMBER,
    "ece_ci95?": (NUMBER, NUMBER),
    "per_class": {"*": CLASS},
    "confusion": [[int]],
    "risk_coverage?": RISK,
    "corruptions?": CORRUPTIONS,
}
MULTILABEL: dict[str, Shape] = {
    **EVALUATION,
    "map": SHARE,
    "map_ci95": list | None,
    "f1_macro": SHARE,
    "f1_micro": SHARE,
    "exact_match": SHARE,
    "exact_match_ci95": (NUMBER, NUMBER),
    "cross_fitted": bool,
    "per_class": {"*": CLASS | {"ap": SHARE, "threshold": NUMBER}},
    "risk_coverage?": {"*": RISK},
}
LR_RANGE: dict[str, Shape] = {
    "chosen": NUMBER,
    "rule": str,
    "rates": [NUMBER],
    "losses": [NUMBER],
    "smoothed": [NUMBER],
}
TIMES: dict[str, Shape] = {"seconds": {"*": NUMBER}, "estimated?": NUMBER}
"""What a run's files must hold."""


class PredictionRow(NamedTuple):
    """One evaluated image; `score` is the softmax probability of the prediction."""

    path: str
    label: str
    prediction: str
    score: float


class LabelSetRow(NamedTuple):
    """One evaluated image with any number of classes; `loss` is its binary cross-entropy, the mean over all classes."""

    path: str
    labels: tuple[str, ...]
    predictions: tuple[str, ...]
    loss: float


Row = TypeVar("Row")


@dataclass(frozen=True)
class Results:
    """Everything that a report tells."""

    run: Path
    recipe: Recipe
    recipe_text: str
    """recipe.toml as it is written."""
    model: dict[str, Any]
    """model.json."""
    epochs: list[dict[str, Any]]
    """metrics.jsonl, a dict per epoch, at least one."""
    lr_range: dict[str, Any] | None
    """lr_range.json, or None where the learning rate was given."""
    times: dict[str, Any] | None
    """times.json of a run in stages: `seconds` of each part, and `estimated` ones where there was an estimate."""
    skipped: list[Skipped]
    excluded: dict[str, str]
    """What the run's list names to be left out, some of which may not be in the data, and why, "" where it says not."""
    evaluation: dict[str, Any] | None
    """evaluation.json, or None where the run has not been evaluated."""
    others: list[dict[str, Any]]
    """The evaluation.json of each folder of RUN/evaluations: on other images."""
    predictions: list[PredictionRow]
    """An entry per evaluated image; empty without an evaluation, and of a multi-label run."""
    label_sets: list[LabelSetRow]
    """The same of a multi-label run."""

    @property
    def is_linear(self) -> bool:
        """Whether the run ended with the linear classifier that it began with, so that there was no epoch."""
        return len(self.epochs) == 1 and self.epochs[0]["epoch"] == 0

    def command(self, verb: str) -> str:
        """The command line that does `verb` to this run."""
        return f"tokenfusion {verb} {shlex.quote(str(self.run))}"


def read_results(run: Path) -> Results:
    """Read a run folder.

    Raises:
        InputError: the folder is not a run, is incomplete, is of a newer version, or its files are damaged or disagree.
    """
    model = load_description(run)
    epochs = read_history(run)
    if not epochs:
        raise InputError(f"{run} has no finished epoch yet; go on with `{resume_command(run)}`")
    predictions: list[PredictionRow] = []
    label_sets: list[LabelSetRow] = []
    if model["multi_label"]:
        evaluation, label_sets = read_judged(run, model["classes"], MULTILABEL, read_label_sets)
    else:
        evaluation, predictions = read_evaluation(run, model["classes"])
    return Results(
        run=run,
        recipe=Recipe(**load_recipe(run / "recipe.toml")),
        recipe_text=(run / "recipe.toml").read_text(encoding="utf-8"),
        model=model,
        epochs=epochs,
        lr_range=read_optional(run / "lr_range.json", LR_RANGE),
        times=read_optional(run / "times.json", TIMES),
        skipped=skipped_in(run),
        excluded=read_excluded(run),
        evaluation=evaluation,
        others=read_others(run, MULTILABEL if model["multi_label"] else ONE_CLASS),
        predictions=predictions,
        label_sets=label_sets,
    )


def read_evaluation(run: Path, classes: list[str]) -> tuple[dict[str, Any] | None, list[PredictionRow]]:
    """evaluation.json and the predictions.csv that belongs to it; None and nothing where there is no evaluation."""
    return read_judged(run, classes, ONE_CLASS, read_predictions)


def read_others(run: Path, shape: dict[str, Shape]) -> list[dict[str, Any]]:
    """The evaluations on other images than those that the run holds out."""
    found = []
    for path in sorted(run.glob(f"{EVALUATIONS}/*/evaluation.json")):
        found.append(read_json(path, f"remove it, or {AGAIN}"))
        require_shape(found[-1], shape, path)
    return found


def read_judged(
    run: Path, classes: list[str], shape: dict[str, Shape], read: Callable[[Path], list[Row]]
) -> tuple[dict[str, Any] | None, list[Row]]:
    """An evaluation as it must be, and what `read` makes of the predictions that belong to it."""
    path = run / "evaluation.json"
    if not path.is_file():
        return None, []
    evaluation = read_json(path, AGAIN)
    require_shape(evaluation, shape, path)
    again = f"make both anew with `tokenfusion evaluate {shlex.quote(str(run))}`"
    confusion = evaluation.get("confusion", [classes] * len(classes))
    sizes = {len(evaluation["per_class"]), len(confusion), *map(len, confusion)}
    if list(evaluation["per_class"]) != classes or sizes != {len(classes)}:
        raise InputError(f"{path} has other classes than model.json, so that it is of another model; {again}")
    if not (run / "predictions.csv").is_file():
        raise InputError(f"run {run} has evaluation.json but no predictions.csv, which is written with it; {again}")
    predictions = read(run / "predictions.csv")
    if len(predictions) != evaluation["n"]:
        raise InputError(
            f"run {run}: predictions.csv has {len(predictions)} images and evaluation.json {evaluation['n']}, "
            f"so that they are of different evaluations; {again}"
        )
    return evaluation, predictions


def read_optional(path: Path, shape: dict[str, Shape]) -> dict[str, Any] | None:
    """A JSON object that not every run has; None where there is none."""
    if not path.is_file():
        return None
    found: dict[str, Any] = read_json(path, AGAIN)
    require_shape(found, shape, path)
    return found


def read_predictions(path: Path) -> list[PredictionRow]:
    """The rows of predictions.csv."""
    return [
        PredictionRow(
            path=row["path"], label=row["label"], prediction=row["prediction"], score=number(row["score"], path)
        )
        for row in read_csv(path, ("path", "label", "prediction", "score"))
    ]


def read_excluded(run: Path) -> dict[str, str]:
    """The paths in excluded.csv and their reasons; nothing where nothing was to be left out."""
    path = run / EXCLUDED
    return reasons_in(read_list(path), str(path)) if path.is_file() else {}


def read_nearest(run: Path) -> dict[str, list[Neighbour]]:
    """The nearest training images of each held-out image, by its name; nothing where the run noted none."""
    path = run / NEAREST
    if not path.is_file():
        return {}
    ranks = range(1, KEPT + 1)
    columns = tuple(f"{what}_{rank}" for rank in ranks for what in ("path", "label", "likeness"))
    return {
        row["path"]: [
            Neighbour(row[f"path_{rank}"], row[f"label_{rank}"], number(row[f"likeness_{rank}"], path))
            for rank in ranks
            if row[f"likeness_{rank}"]
        ]
        for row in read_csv(path, ("path", *columns))
    }


def read_label_sets(path: Path) -> list[LabelSetRow]:
    """The rows of a multi-label run's predictions.csv."""
    return [
        LabelSetRow(row["path"], names(row["labels"]), names(row["predictions"]), number(row["loss"], path))
        for row in read_csv(path, ("path", "labels", "predictions", "loss"))
    ]


def names(cell: str) -> tuple[str, ...]:
    """The classes in a cell, which have `|` between them."""
    return tuple(cell.split("|")) if cell else ()


def number(text: str, path: Path) -> float:
    """A float from a CSV file."""
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{path}: score {text!r} is not a number; restore it, or evaluate again") from error


def require_fields(value: Any, types: FieldTypes, path: Path) -> None:
    """Refuse an object of a file that lacks some of its fields, or has one of another type.

    Raises:
        InputError: it does.
    """
    require(value, tuple(types), path)
    for key, expected in types.items():
        if not isinstance(value[key], expected):
            raise damaged(path, f"{key} is {value[key]!r:.60}")
