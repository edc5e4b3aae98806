"""How good a trained run is, on images it has not seen."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import compress, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenfusion.calibrate import choose_temperature, cross_fitted_temperatures, halves, surest_errors
from tokenfusion.checkpoint import weights_in_words
from tokenfusion.classifier import Classifier
from tokenfusion.compiled import compiled_classifier, require_compiler
from tokenfusion.corruptions import measure_corruptions
from tokenfusion.data.dataset import Dataset, held_out_name
from tokenfusion.data.decode import damaged_in_words
from tokenfusion.data.decoded import Images
from tokenfusion.data.loader import eval_batches
from tokenfusion.errors import InputError
from tokenfusion.files import make_folder, own_results, write_csv, write_json
from tokenfusion.formatting import Progress, unheard
from tokenfusion.judged import judged_images, open_judged
from tokenfusion.metrics import evaluate_logits, require_finite_logits, risk_coverage
from tokenfusion.multilabel import cross_fitted, evaluate_multilabel, image_losses, sigmoid_scores, tune_thresholds
from tokenfusion.recipe import Recipe, load_recipe
from tokenfusion_runtime.prediction import sureness

BATCH = 256
"""Images in the model at once."""


def evaluate(
    run: Path,
    data: str | None = None,
    split: str | None = None,
    progress: Progress = unheard,
    *,
    root: str = "",
    encoding: str = "",
    out: Path | None = None,
    with_training_images: bool = False,
    corruptions: bool = False,
    compile: bool = False,
) -> dict[str, Any]:
    """Evaluate a run; write `evaluation.json`, and `predictions.csv` with a line per image.

    Its own held-out images are written of in the run's folder, others below it, see `place_of`.

    Args:
        run: a finished run folder.
        data: labelled images of the run's classes; the run's own held-out images when not given.
        split: "train", "val" or "test" of data that has such parts; by default val, else test, else everything.
        progress: told of the images that are read, and then judged.
        root: folder that the paths of `data` start at, where that is a list; its own when not given.
        encoding: of such a list that is in no UTF; guessed when not given.
        out: folder to write to; `place_of` says which when not given.
        with_training_images: whether images that the run was trained on are judged too; they are told by their pixels,
            and left out otherwise, but where they are the run's own and `split` asks for them.
        corruptions: whether to judge the images made worse too; takes some twenty times as long.
        compile: whether to compile the model first, which changes rounding alone.

    Returns:
        What `evaluation.json` holds (see `metrics.evaluate_logits`), with `data`, `split`, the `unreadable` images and
        those `damaged`, which were read as far as they go; of multi-label runs see `multilabel.evaluate_multilabel`.
        `own`: whether these are the run's own images.
        `trained_on`: how many images the run was trained on, None where that is not known, and
        `trained_on_left_out`. `cross_fitted`: whether these are the held-out images that temperature and thresholds
        were fitted on, so that each half of them is judged by those of the other half. `corruptions`: what
        `measure_corruptions` gives, if it was asked for.

    Raises:
        InputError: the run or the data cannot be used, the data has classes that the model does not know, or nothing
            is left of it.
    """
    classifier, recipe = Classifier.load(run), Recipe(**load_recipe(run / "recipe.toml"))
    if corruptions and classifier.multi_label:
        raise InputError(f"{run} has any number of classes an image; corruptions are judged of one class an image")
    require_writable(run, out)
    if compile:
        require_compiler(classifier.device)
    source, place, own = open_judged(run, recipe, data, root, encoding)
    moved_to = place if not data and place != recipe.data else ""
    refuse_other_kind(source, classifier)
    to_output = output_of_class(source, classifier.classes)
    keep = with_training_images
    reading = partial(progress, "reading images")
    judged = judged_images(run, recipe, source, own=own, split=split, keep=keep, progress=reading)
    images, skipped, name, own = judged.images, judged.skipped, judged.split, judged.own
    faster = compiled_classifier(classifier, min(BATCH, len(images))) if compile else classifier.packed()
    judging = partial(progress, "judging images")
    logits, labels = collect_logits(faster, images, workers=recipe.workers, progress=judging)
    labels = as_outputs(labels, to_output, len(classifier.classes))
    out = out or place_of(run, place, name, own=own)
    cross_fit = own and name == ("val" if (run / "split.csv").exists() else held_out_name(source))
    judge = judge_label_sets if classifier.multi_label else judge_classes
    result, write = judge(classifier, images, logits, labels, cross_fit, len(skipped))
    if corruptions:
        worse = partial(progress, "judging worse images")
        result["corruptions"] = judge_corrupted(faster, images, to_output, recipe.workers, worse)
    unreadable = [{"path": image.path, "reason": image.reason} for image in skipped]
    result |= {"cross_fitted": cross_fit, "data": place, "split": name, "own": own, "unreadable": unreadable}
    result |= {"damaged": [{"path": path, "reason": said} for path, said in images.damaged.items()]}
    result |= {"trained_on": judged.trained_on, "trained_on_left_out": judged.left_out}
    result |= {"began_with": list(classifier.began_with), "moved_to": moved_to}
    make_folder(out)
    with own_results(out):
        write(out / "predictions.csv")
        write_json(out / "evaluation.json", result)
    return result


def judge_classes(
    classifier: Classifier, images: Images, logits: Tensor, labels: Tensor, cross_fit: bool, skipped: int
) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """What is said of one class an image, and what writes a line of each image to a file."""
    require_finite_logits(logits)
    temperatures = torch.full((len(labels),), classifier.temperature)
    if cross_fit and classifier.surest_errors:  # where an older version fitted none, there is none to be fair about
        temperatures = cross_fitted_temperatures(logits, labels)
    classes, groups = classifier.classes, images.dataset.groups
    result = evaluate_logits(logits, labels, classes, skipped, temperatures, groups)
    scores = (logits / temperatures[:, None]).softmax(1)
    return result, lambda path: write_predictions(path, classes, images.names, labels, scores, groups)


def judge_label_sets(
    classifier: Classifier, images: Images, logits: Tensor, labels: Tensor, cross_fit: bool, skipped: int
) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """The same of any number of classes an image."""
    chosen = choose_classes(classifier, logits, labels, cross_fit)
    classes, groups = classifier.classes, images.dataset.groups
    result = evaluate_multilabel(logits, labels, chosen, classes, classifier.thresholds, skipped, groups)
    result |= {"multi_label": True, "risk_coverage": risk_by_class(classifier, logits, labels, chosen)}
    return result, lambda path: write_label_sets(path, classes, images.names, labels, chosen, logits)


def judge_corrupted(
    classifier: Classifier, images: Images, to_output: Tensor, workers: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """What `measure_corruptions` finds of images whose labels are those of the data."""
    workers = 0 if images.cached else workers
    batches = eval_batches(images, classifier.preprocess, batch_size=BATCH, workers=workers)
    labelled = ((batch, to_output[labels]) for batch, labels in batches)
    return measure_corruptions(
        classifier.logits, labelled, images.dataset.groups, lambda done: progress(done, len(images))
    )


def mistaken_of(run: Path, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """What answers are often wrong about: of the held-out images that were given a class, the shares of other classes.

    Returns:
        {class named: {true class: share}} of the shares of 5 % or more that are of two images at least; {} where the
        run was not evaluated on its own images, or has any number of classes an image.
    """
    try:
        evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        table = evaluation["confusion"] if evaluation["own"] else []
    except (OSError, ValueError, KeyError):
        return {}
    found: dict[str, dict[str, float]] = {}
    for column, named in enumerate(classes if len(table) == len(classes) else ()):
        total = sum(row[column] for row in table)
        shares = {classes[i]: row[column] / total for i, row in enumerate(table) if i != column and row[column] > 1}
        if often := {name: share for name, share in shares.items() if share >= 0.05}:
            found[named] = often
    return found


def require_writable(run: Path, out: Path | None) -> None:
    """Refuse a folder that cannot be written before anything is judged; it is made where it is missing."""
    if out is not None:
        make_folder(out)
    if not os.access(out or run, os.W_OK):
        raise InputError(f"{out or run} cannot be written; give another folder by --out DIR")


EVALUATIONS = "evaluations"


def place_of(run: Path, data: str, split: str, *, own: bool) -> Path:
    """Where an evaluation is written: of the run's own held-out images in its folder, so that nothing else takes their
    place; of others in RUN/evaluations/NAME, named by their data.

    Args:
        run: its folder.
        data, split, own: as `evaluation.json` has them.
    """
    if own and split not in ("train", "all"):
        return run
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(data).stem).strip("_")[:40] or "x"
    name += f"-{split}" * (split != "all")
    for number in count(1):
        folder = run / EVALUATIONS / (name if number == 1 else f"{name}-{number}")
        with suppress(OSError, ValueError, KeyError, TypeError):  # what is damaged is written anew
            written = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
            if (written["data"], written["split"]) != (data, split):
                continue
        return folder
    raise AssertionError("numbers have no end")


IN_WORDS = {"val": "the held-out images of", "test": "the test images of", "train": "the training images of"}


def images_in_words(result: dict[str, Any]) -> str:
    """Which images an evaluation is of."""
    return f"{IN_WORDS.get(result['split'], 'all images of')} {result['data']}"


def refuse_other_kind(source: Dataset, classifier: Classifier) -> None:
    """Refuse data of one class an image for a model of any number of them, and the other way round."""
    if source.multi_label == classifier.multi_label:
        return
    one, several = "one class an image", "any number of classes an image"
    has, wants = (several, one) if source.multi_label else (one, several)
    column = "labels" if classifier.multi_label else "label"
    raise InputError(f"{source.where} has {has}, but the model was trained on {wants}; give data with `{column}`")


def output_of_class(source: Dataset, classes: Sequence[str]) -> Tensor:
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


def collect_logits(
    classifier: Classifier,
    images: Images,
    batch_size: int = BATCH,
    workers: int = 0,
    indices: Sequence[int] | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and labels (N,) of all the images, in order, or of those of some indices.

    `workers` processes decode what is not in memory; `progress` is called with images judged, and images in all.
    """
    workers = 0 if images.cached else workers
    batches = eval_batches(images, classifier.preprocess, batch_size=batch_size, workers=workers, indices=indices)
    logits, labels, done = [], [], 0
    for batch, some in batches:
        logits.append(classifier.logits(batch))
        labels.append(some)
        done += len(some)
        progress(done, len(images) if indices is None else len(indices))
    return torch.cat(logits), torch.cat(labels)


def as_outputs(labels: Tensor, to_output: Tensor, outputs: int) -> Tensor:
    """Labels (N,) or (N, K) as the model numbers its outputs, given the output of each of the data's classes."""
    if labels.ndim == 1:
        return to_output[labels]
    return labels.new_zeros(len(labels), outputs).index_copy_(1, to_output, labels)


def choose_classes(classifier: Classifier, logits: Tensor, labels: Tensor, cross_fit: bool) -> np.ndarray:
    """Which classes each image is given, bool (N, K).

    Args:
        classifier: gives thresholds.
        logits, labels: (N, K).
        cross_fit: whether to judge each half of the images by thresholds tuned on the other half instead.
    """
    scores = sigmoid_scores(logits / classifier.temperature)
    if not cross_fit:
        return scores >= np.array(classifier.thresholds)
    return cross_fitted(scores, labels.numpy(), halves(labels).numpy())


def risk_by_class(classifier: Classifier, logits: Tensor, labels: Tensor, chosen: np.ndarray) -> dict[str, Any]:
    """For each class how many of the answers are wrong if only the surest are given: those far from the threshold.

    Args:
        classifier: gives temperature, thresholds and names.
        logits, labels: (N, K).
        chosen: bool (N, K), the answers.
    """
    sure = sureness(sigmoid_scores(logits / classifier.temperature), np.array(classifier.thresholds))
    columns = zip(classifier.classes, sure.T, (chosen == labels.numpy()).T, strict=True)
    return {name: risk_coverage(values, right) for name, values, right in columns}


def write_predictions(
    path: Path,
    classes: Sequence[str],
    names: Sequence[str],
    labels: Tensor,
    scores: Tensor,
    groups: np.ndarray | None = None,
) -> None:
    """Write `path,label,prediction,score` for every image, given probabilities (N, K); `group` too where there are."""
    best, predictions = (values.tolist() for values in scores.max(1))
    group = [()] * len(names) if groups is None else [(number,) for number in groups.tolist()]
    rows = (
        (name, classes[label], classes[prediction], f"{score:.6f}", *rest)
        for name, label, prediction, score, rest in zip(names, labels.tolist(), predictions, best, group, strict=True)
    )
    write_csv(path, ("path", "label", "prediction", "score", *("group",) * (groups is not None)), rows)


def write_label_sets(
    path: Path, classes: Sequence[str], names: Sequence[str], labels: Tensor, predictions: np.ndarray, logits: Tensor
) -> None:
    """Write `path,labels,predictions,loss` for every image, with `|` between classes."""
    losses = image_losses(logits, labels).tolist()
    rows = (
        (name, *("|".join(compress(classes, chosen)) for chosen in sets), f"{loss:.6f}")
        for name, *sets, loss in zip(names, labels.tolist(), predictions.tolist(), losses, strict=True)
    )
    write_csv(path, ("path", "labels", "predictions", "loss"), rows)


def evaluation_summary(result: dict[str, Any]) -> list[str]:
    """What an evaluation found, in a few lines."""
    began = [f"began with {weights_in_words(files)}"] if (files := result.get("began_with")) else []
    moved = [f"the images were moved along with the run, to {to}"] if (to := result.get("moved_to")) else []
    damaged = damaged_in_words({image["path"]: image["reason"] for image in result.get("damaged", ())})
    return [*moved, *training_images_in_words(result), *[damaged] * bool(damaged), *scores_in_words(result), *began]


def training_images_in_words(result: dict[str, Any]) -> list[str]:
    """How many of the data's images the run was trained on, where it is the run's own training images that are not
    asked for; a line at most."""
    seen = result.get("trained_on", 0)
    if seen is None:
        return (
            []
            if result["own"]
            else ["whether the run was trained on some of these images is not known; where it was, that flatters it"]
        )
    if not seen or (result["own"] and result["split"] == "train"):
        return []
    left_out = result["trained_on_left_out"]
    what = "left out; --with-training-images judges them too" if left_out else "judged too, which flatters it"
    return [f"the run was trained on {seen:,} of {result['n'] + seen * left_out:,} images: {what}"]


def scores_in_words(result: dict[str, Any]) -> list[str]:
    """How good a run is, in three lines."""
    if not result.get("multi_label"):
        low, high = result["top1_ci95"]
        top5 = f", top-5 {result['top5']:.2%}" * (len(result["per_class"]) > 5)
        top1 = f"top-1 {result['top1']:.2%} (95 % interval {low:.2%} to {high:.2%}{of_groups(result)}){top5}"
        low, high = result["ece_ci95"]
        ece = f"calibration error {result['ece']:.2%} (95 % interval {low:.2%} to {high:.2%})"
        answered = f"if only the surest half were answered, {risk_at(result['risk_coverage'], 0.5):.2%} would be wrong"
        return [top1, f"loss {result['loss']:.4f}, {ece}, of raw scores {result['ece_raw']:.2%}", answered]
    if result["map"] is None:
        lines = ["none of the images has any of the classes, so that there is no mAP"]
    else:
        low, high = result["map_ci95"]
        interval = f"95 % interval {low:.2%} to {high:.2%}{of_groups(result)}"
        lines = [f"mAP {result['map']:.2%} ({interval}), loss {result['loss']:.4f}"]
    macro, micro = ("–" if value is None else f"{value:.2%}" for value in (result["f1_macro"], result["f1_micro"]))
    lines.append(f"F1 {macro} macro, {micro} micro; all classes right in {result['exact_match']:.2%} of the images")
    if result["cross_fitted"]:
        lines.append("each half of the images is judged by thresholds that were tuned on the other half")
    return lines


def risk_at(curve: Mapping[str, list[float]], coverage: float) -> float:
    """The share of wrong answers where at least so many of the images are answered."""
    return next(risk for share, risk in zip(curve["coverage"], curve["risk"], strict=True) if share >= coverage)


def of_groups(result: dict[str, Any]) -> str:
    """That an interval is of whole groups, where it is."""
    return f", of whole groups, {result['groups']:,} of them" if result.get("groups") else ""


def calibrated(classifier: Classifier, images: Images, workers: int = 0) -> Classifier:
    """A classifier with the temperature that held-out images choose, where its errors on them lie and, where it is
    multi-label, thresholds that give the largest F1 on them."""
    logits, labels = collect_logits(classifier, images, workers=workers)
    require_finite_logits(logits)
    classifier = replace(classifier, temperature=choose_temperature(logits, labels))
    scores = classifier.scores(logits)  # in float32, as predictions have them: what rounds to 1 is a tie there too
    if classifier.multi_label:
        thresholds = tune_thresholds(scores.numpy(), labels.numpy())
        classifier = replace(classifier, thresholds=tuple(thresholds.tolist()))
    return replace(classifier, surest_errors=surest_errors(scores, labels, classifier.thresholds))
