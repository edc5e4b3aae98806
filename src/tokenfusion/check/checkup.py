"""From labelled images to the folder of a check-up."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenfusion.check.classes import count_classes
from tokenfusion.check.crop import measure_crop
from tokenfusion.check.duplicates import MAX_IMAGES, exact_duplicates, near_duplicates
from tokenfusion.check.inspection import Inspection, inspect_images
from tokenfusion.check.labels import MIN_IMAGES, Judgement, choose_judged, judge_labels, thumbnail_features
from tokenfusion.check.quarantine import quarantine, write_quarantine
from tokenfusion.check.report import write_check
from tokenfusion.check.seen import Seen, build_parents, see_images
from tokenfusion.classifier import Classifier
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.describe import describe
from tokenfusion.data.exclude import leave_out
from tokenfusion.data.groups import suspected_groups
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import choose_split
from tokenfusion.data.usable import without_rare
from tokenfusion.data.value_range import with_value_range
from tokenfusion.errors import InputError
from tokenfusion.files import own_folder, refuse_inside, write_json
from tokenfusion.hardware import keep_freed_memory
from tokenfusion.preset import preset
from tokenfusion.recipe import Reading, Recipe

THUMBNAILS_C, SEEN_C = 0.003, 0.003
"""Inverse strength of the penalty of classifiers on thumbnails, and on what pretrained parents see."""
TINY, HUGE = 1 / 4, 8
"""Times the median image's shorter side, below which an image is tiny; times the longer one's, above which huge."""


def check_data(
    data: str,
    out: Path | None,
    img_size: tuple[int, int],
    progress: Callable[[str, int, int], None],
    reading: Reading = Reading(),  # noqa: B008 - frozen
    start: Recipe = Recipe(),  # noqa: B008 - frozen
) -> tuple[dict[str, Any], Path]:
    """Check labelled images; write `check.json`, `quarantine.csv` and `check.html`.

    Args:
        data: as `train` takes it.
        out: folder to write to, outside the data; check-NAME here when None.
        img_size: height and width of the model's input, of which only the aspect matters.
        progress: called with (what is done, images done, images in all).
        reading: how to understand the data where it does not say.
        start: where it names `pretrained` weights, labels are judged by what its model's parents see.

    Returns:
        what check.json holds, and the folder.

    Raises:
        InputError: the data cannot be opened, or the folder lies in it or cannot be written.
    """
    began = time.perf_counter()
    keep_freed_memory()
    folder = folder_for(data, out)
    dataset = open_dataset(data, reading=reading)
    training = np.array([i for i, split in enumerate(dataset.splits) if split in ("train", "")], dtype=np.int64)
    dataset, values = with_value_range(dataset, training, reading.value_range, Recipe.max_pixels)
    dataset = replace(dataset, notes=(*dataset.notes, *[values] * bool(values)))
    parents = build_parents(start, dataset) if start.pretrained else None
    with own_folder(folder):
        result, excluded = look_at(dataset, img_size, progress, reading.rare_classes, parents)
        result = {"data": data} | result | {"seconds": round(time.perf_counter() - began, 1)}
        write_quarantine(folder / "quarantine.csv", dataset, excluded)
        write_json(folder / "check.json", result)
        write_check(folder / "check.html", dataset, result, Recipe.max_pixels)
    return result, folder


def look_at(
    dataset: Dataset,
    img_size: tuple[int, int],
    progress: Callable[[str, int, int], None],
    rare_classes: str,
    parents: Classifier | None,
) -> tuple[dict[str, Any], dict[int, str]]:
    """All that is found, as check.json has it, and which images had better be left out, with the reasons."""
    judged = choose_judged(dataset.labels)
    searched = len(dataset) <= MAX_IMAGES
    compared = range(len(dataset)) if searched else set(judged.tolist())
    inspections = inspect_images(dataset, Recipe.max_pixels, compared, lambda *done: progress("reading images", *done))
    began = time.perf_counter()
    seen = None
    if parents is not None:
        seen = see_images(parents, dataset, inspections, lambda *done: progress("parents look at images", *done))
    feature_seconds = time.perf_counter() - began
    exact = exact_duplicates(inspections)
    near = near_duplicates(inspections if searched else [], lambda *done: progress("comparing images", *done))
    progress("judging labels", 0, 1)
    judgement = judge(dataset, inspections, judged, seen)
    progress("judging labels", 1, 1)
    excluded = quarantine(dataset, inspections, exact, [(pair.first, pair.second) for pair in near.pairs])
    result: dict[str, Any] = {
        "images": len(dataset),
        "understood": describe(dataset),
        "value_range": dataset.value_range,
        "suspected": [line for line in [suspected_groups(dataset)] if line],
        "ignored": dataset.ignored,
        "splits": {name or "all": images for name, images in Counter(dataset.splits).items()},
        "unreadable": [
            known(dataset, index) | {"kind": image.kind, "reason": image.reason}
            for index, image in enumerate(inspections)
            if image.reason
        ],
        **find_unusual(dataset, inspections),
        "exact_duplicates": [group_of(dataset, copies) for copies in exact],
        "near_duplicates": [
            group_of(dataset, [pair.first, pair.second]) | {"likeness": pair.likeness} for pair in near.pairs
        ],
        "near_duplicates_searched": {key: value for key, value in asdict(near).items() if key != "pairs"},
        "classes": count_classes(dataset.classes, dataset.labels, dataset.splits),
        "labels": labels_found(dataset, judgement, parents),
        "crop": {"by": "the pretrained weights" if parents else "training from random weights"}
        | measure_crop(dataset.names, inspections, img_size, evaluation_crop(dataset, parents)),
        "quarantined": len(excluded),
        "train_refuses": why_train_refuses(dataset, excluded, rare_classes),
        "feature_seconds": round(feature_seconds, 1),
    }
    return result, excluded


def evaluation_crop(dataset: Dataset, parents: Classifier | None) -> float:
    """Share of an image's sides that the model will see: as pretrained weights want it, or else `train` by default."""
    if parents is not None:
        return parents.preprocess.crop_pct
    return Recipe(**preset("", dataset.where)).crop_pct


def labels_found(dataset: Dataset, judgement: Judgement, parents: Classifier | None) -> dict[str, Any]:
    """What is said of the labels: by whom they were judged, how well, and which are disputed."""
    few = [] if dataset.multi_label else np.bincount(dataset.labels)[dataset.labels] < MIN_IMAGES
    return {
        "judged": judgement.judged,
        "of_rare_classes": int(np.sum(few)),
        "model_accuracy": judgement.accuracy,
        "judged_by": list(parents.began_with) if parents else [],
        "note": judgement.note,
        "wrong_share": judgement.share,
        "disputes": [
            known(dataset, dispute.image)
            | {"suggestion": dataset.classes[dispute.suggestion]}
            | {name: round(getattr(dispute, name), 4) for name in ("score", "label_score", "wrong", "precision")}
            for dispute in judgement.disputes
        ],
    }


def folder_for(data: str, out: Path | None) -> Path:
    """The folder to write to; InputError where it lies inside the data."""
    folder = out or Path(f"check-{name_of(data)}")
    refuse_inside(folder, data)
    return folder


def name_of(data: str) -> str:
    """A short name of the data, for folders."""
    return re.sub(r"[^\w.-]+", "-", Path(data).resolve().name.split(".")[0]).strip("-") or "data"


def free_run(data: str) -> Path:
    """A run folder that is not there yet, named after the data."""
    run = Path("runs") / name_of(data)
    return next(free for free in chain([run], (Path(f"{run}-{n}") for n in count(2))) if not free.exists())


def judge(dataset: Dataset, inspections: list[Inspection], judged: np.ndarray, seen: Seen | None) -> Judgement:
    """What quick classifiers say of the labels of some images: by thumbnails, or by what pretrained parents see."""
    if dataset.multi_label:
        return Judgement([], 0, None, note="the images have any number of labels each")
    read = np.array([index for index in judged if not inspections[index].reason], dtype=np.int64)
    groups = None if dataset.groups is None else dataset.groups[read]
    if not len(read):
        return judge_labels([], dataset.labels[read], read, groups, THUMBNAILS_C)
    if seen is not None:
        return judge_labels(seen.means(read), dataset.labels[read], read, groups, SEEN_C)
    features = thumbnail_features(torch.stack([inspections[index].thumbnail for index in read]))
    return judge_labels([features], dataset.labels[read], read, groups, THUMBNAILS_C)


def why_train_refuses(dataset: Dataset, excluded: Iterable[int], rare_classes: str) -> str:
    """What `train` would say of the images that are left, such as that a class has none; empty where it takes them."""
    try:
        left = leave_out(dataset, {dataset.names[index] for index in excluded}, "quarantine.csv")
        left = without_rare(left) if rare_classes == "drop" else left
        choose_split(left, Recipe.val_fraction, Recipe.seed, rare_classes)
    except InputError as error:
        return str(error)
    return ""


def known(dataset: Dataset, index: int) -> dict[str, Any]:
    """What every finding says of an image."""
    return {"path": dataset.names[index], "label": dataset.label_text(index), "split": dataset.splits[index]}


def group_of(dataset: Dataset, group: list[int]) -> dict[str, Any]:
    """Images that are the same, and whether their splits and labels are."""
    images = [known(dataset, index) for index in group]
    splits, labels = ({image[key] for image in images} for key in ("split", "label"))
    return {"images": images, "between_splits": len(splits) > 1, "labels_differ": len(labels) > 1}


def find_unusual(dataset: Dataset, inspections: list[Inspection]) -> dict[str, list[dict[str, Any]]]:
    """Readable images that are damaged, tiny, huge, animated or oddly coloured."""
    found: dict[str, list[dict[str, Any]]] = {
        kind: [] for kind in ("damaged", "tiny", "huge", "animated", "odd_colour")
    }
    read = {index: image for index, image in enumerate(inspections) if not image.reason}
    sides = np.array([sorted((image.height, image.width)) for image in read.values()] or [[0, 0]])
    short, long = np.median(sides, 0) * (TINY, HUGE)
    for index, image in read.items():
        size = f"{image.width}×{image.height} pixels"
        reasons = {
            "damaged": image.damage,
            "tiny": size * bool(min(image.height, image.width) < short),
            "huge": size * bool(max(image.height, image.width) > long),
            "animated": image.frames,
            "odd_colour": image.colour,
        }
        for kind, reason in reasons.items():
            if reason:
                found[kind].append(known(dataset, index) | {"reason": reason})
    return found
