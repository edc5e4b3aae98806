"""From labelled images to the folder of a check-up."""

import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenfusion.check.crop import describe_crop
from tokenfusion.check.duplicates import MAX_IMAGES, NearDuplicates, exact_duplicates, near_duplicates
from tokenfusion.check.labels import TOO_FEW, Judgement, choose_judged, count_classes, judge_labels
from tokenfusion.check.look import Look, look_at_all
from tokenfusion.check.quarantine import quarantine, write_quarantine
from tokenfusion.check.report import write_check
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.exclude import leave_out
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import choose_split
from tokenfusion.errors import InputError
from tokenfusion.files import write_json
from tokenfusion.hardware import keep_freed_memory
from tokenfusion.recipe import Recipe

TINY, HUGE = 1 / 4, 8
"""Times the median image's shorter side, below which an image is tiny; times the longer one's, above which huge."""
Progress = Callable[[str, int, int], None]


def check_data(
    data: str, out: Path | None, img_size: tuple[int, int], progress: Progress
) -> tuple[dict[str, Any], Path]:
    """Check labelled images; write `check.json`, `quarantine.csv` and `check.html`.

    Args:
        data: as `train` takes it.
        out: folder to write to, outside the data; check-NAME here when None.
        img_size: height and width of the model's input, of which only the aspect matters.
        progress: called with (what is done, images done, images in all).

    Returns:
        what check.json holds, and the folder.

    Raises:
        InputError: the data cannot be opened, or the folder lies in it or cannot be written.
    """
    began = time.perf_counter()
    keep_freed_memory()
    folder = folder_for(data, out)
    source = open_dataset(data)
    make(folder)
    recipe = Recipe()
    judged = choose_judged(source.labels)
    compared = range(len(source)) if len(source) <= MAX_IMAGES else set(judged.tolist())
    looks = look_at_all(
        source, recipe.max_pixels, compared, lambda done, total: progress("reading images", done, total)
    )
    near = search_near(looks, lambda done, total: progress("comparing images", done, total))
    exact = exact_duplicates(looks)
    progress("judging labels", 0, 1)
    judgement = judge(source, looks, judged)
    progress("judging labels", 1, 1)
    result: dict[str, Any] = {
        "data": data,
        "images": len(source),
        "ignored": source.ignored,
        "splits": {name or "all": count for name, count in Counter(source.splits).items()},
        "unreadable": [
            known(source, i) | {"kind": look.kind, "reason": look.reason} for i, look in enumerate(looks) if look.reason
        ],
        **unusual(source, looks),
        "exact_duplicates": [group_of(source, group) for group in exact],
        "near_duplicates": [
            group_of(source, [pair.first, pair.second]) | {"likeness": pair.likeness} for pair in near.pairs
        ],
        "near_duplicates_searched": {key: value for key, value in asdict(near).items() if key != "pairs"},
        "classes": count_classes(source.classes, source.labels, source.splits),
        "labels": describe_labels(source, judgement),
        "crop": describe_crop(source.names, looks, img_size, recipe.crop_pct),
    }
    excluded = quarantine(source, looks, exact, [(pair.first, pair.second) for pair in near.pairs])
    result |= {"quarantined": len(excluded), "train_refuses": why_train_refuses(source, excluded)}
    result["seconds"] = round(time.perf_counter() - began, 1)
    write_quarantine(folder / "quarantine.csv", source, excluded)
    write_json(folder / "check.json", result)
    write_check(folder / "check.html", source, result, recipe.max_pixels)
    return result, folder


def folder_for(data: str, out: Path | None) -> Path:
    """The folder to write to; InputError where it lies inside the data."""
    folder = out or Path(f"check-{name_of(data)}")
    if folder.resolve().is_relative_to(Path(data).resolve()) and data != "digits":
        raise InputError(f"{folder} lies inside the data, which is left as it is; give a folder outside it with --out")
    return folder


def name_of(data: str) -> str:
    """A short name of the data, for folders."""
    return re.sub(r"[^\w.-]+", "-", Path(data).resolve().name.split(".")[0]).strip("-") or "data"


def free_run(data: str) -> Path:
    """A run folder that is not there yet, named after the data."""
    run = Path("runs") / name_of(data)
    names = (run.with_name(f"{run.name}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([run], names) if not free.exists())


def make(folder: Path) -> None:
    """Make a folder where it is missing; InputError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; give another --out") from error


def why_train_refuses(source: Dataset, excluded: Iterable[int]) -> str:
    """What `train` would say of the images that are left, such as that a class has none; empty where it takes them."""
    try:
        left = leave_out(source, {source.names[index] for index in excluded}, "quarantine.csv")
        choose_split(left, Recipe.val_fraction, Recipe.seed)
    except InputError as error:
        return str(error)
    return ""


def known(source: Dataset, index: int) -> dict[str, Any]:
    """What every finding says of an image."""
    return {"path": source.names[index], "label": source.label_text(index), "split": source.splits[index]}


def group_of(source: Dataset, group: list[int]) -> dict[str, Any]:
    """Images that are the same, and whether their splits and labels are."""
    images = [known(source, index) for index in group]
    splits, labels = ({image[key] for image in images} for key in ("split", "label"))
    return {"images": images, "between_splits": len(splits) > 1, "labels_differ": len(labels) > 1}


def unusual(source: Dataset, looks: list[Look]) -> dict[str, list[dict[str, Any]]]:
    """Readable images that are tiny, huge, animated or oddly coloured."""
    read = {index: look for index, look in enumerate(looks) if not look.reason}
    if not read:
        return {"tiny": [], "huge": [], "animated": [], "odd_colour": []}
    short = TINY * float(np.median([min(look.height, look.width) for look in read.values()]))
    long = HUGE * float(np.median([max(look.height, look.width) for look in read.values()]))

    def those(reason: Callable[[Look], str]) -> list[dict[str, Any]]:
        return [known(source, i) | {"reason": words} for i, look in read.items() if (words := reason(look))]

    def size(look: Look) -> str:
        return f"{look.width}×{look.height} pixels"

    return {
        "tiny": those(lambda look: size(look) if min(look.height, look.width) < short else ""),
        "huge": those(lambda look: size(look) if max(look.height, look.width) > long else ""),
        "animated": those(lambda look: look.frames),
        "odd_colour": those(lambda look: look.colour),
    }


def search_near(looks: list[Look], progress: Callable[[int, int], None]) -> NearDuplicates:
    """The near duplicates; none are searched where there are too many images."""
    return near_duplicates(looks, progress) if len(looks) <= MAX_IMAGES else NearDuplicates([], 0, 0, 0)


def judge(source: Dataset, looks: list[Look], judged: np.ndarray) -> Judgement:
    """What a quick model says of the labels of some images."""
    if source.multi_label:
        return Judgement([], 0, None, "the images have any number of labels each")
    read = np.array([index for index in judged if not looks[index].reason], dtype=np.int64)
    if not len(read):
        return Judgement([], 0, None, TOO_FEW)
    return judge_labels(torch.stack([looks[index].thumbnail for index in read]), source.labels[read], read)


def describe_labels(source: Dataset, judgement: Judgement) -> dict[str, Any]:
    """The judgement as check.json has it."""
    disputes = [
        known(source, dispute.index)
        | {"suggestion": source.classes[dispute.suggestion]}
        | {"score": round(dispute.score, 4), "label_score": round(dispute.label_score, 4)}
        for dispute in judgement.disputes
    ]
    return {
        "judged": judgement.judged,
        "model_accuracy": judgement.accuracy,
        "note": judgement.note,
        "disputes": disputes,
    }
