"""The check-up as a page: what was found, in words and pictures."""

import base64
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.io import encode_jpeg

from tokenfusion.check.crop import MANY
from tokenfusion.check.duplicates import MAX_IMAGES, SAME
from tokenfusion.check.labels import MIN_IMAGES
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decode import UnreadableImage
from tokenfusion.formatting import counted
from tokenfusion.report.page import percent, write_page
from tokenfusion.report.pictures import SIDE, shrink

MAX_PICTURES = 24
"""Groups of duplicates, and disputes, that are shown as pictures at most."""
MAX_OF_A_KIND = 12
"""Pictures of what the crop cuts off, of tiny images, of huge ones and so on at most."""
LARGE_SIDE = 2 * SIDE
"""Longest side in pixels of the pictures that show what is cut off."""
MAX_COPIES = 4
"""Images of a group of duplicates that are shown at most."""
MAX_LISTED = 200
"""Images of a kind that are listed at most."""
KINDS = {
    "unreadable": "Unreadable",
    "damaged": "Damaged",
    "tiny": "Tiny",
    "huge": "Huge",
    "animated": "Animated",
    "odd_colour": "Oddly coloured",
}
"""Fields of check.json and their headings."""


def write_check(path: Path, dataset: Dataset, result: dict[str, Any], max_pixels: int) -> None:
    """Write the page, with pictures from the dataset."""
    indices = {name: index for index, name in enumerate(dataset.names)}

    def with_picture(found: dict[str, Any], side: int = SIDE) -> dict[str, Any]:
        try:
            image = dataset.decode(indices[found["path"]], max_pixels)
        except UnreadableImage:  # changed since it was inspected
            return found | {"address": "", "small": False, "aspect": 1.0}
        return found | encode_picture(image, side)

    # first those between splits, then those whose labels differ
    groups = [*result["exact_duplicates"], *result["near_duplicates"]]
    groups.sort(key=lambda group: (not group["between_splits"], not group["labels_differ"]))
    values = {
        "result": result,
        "summary": summarise(result),
        "kinds": [
            {
                "heading": heading,
                "all": result[kind],
                "listed": result[kind][:MAX_LISTED],
                "pictures": [with_picture(image) for image in result[kind][:MAX_OF_A_KIND] if kind != "unreadable"],
            }
            for kind, heading in KINDS.items()
        ],
        "counted": counted,
        "groups": [
            group | {"images": [with_picture(image) for image in group["images"][:MAX_COPIES]]}
            for group in groups[:MAX_PICTURES]
        ],
        "total_groups": len(groups),
        "disputes": [with_picture(dispute) for dispute in result["labels"]["disputes"][:MAX_PICTURES]],
        "ranks": at_ranks(result["labels"]["disputes"]),
        "cut": [with_picture(box, LARGE_SIDE) for box in result["crop"]["least_kept"][:MAX_OF_A_KIND]],
        "splits": [name for name in ("train", "val", "test", "") if name in result["classes"][0]["images"]],
        "many": MANY,
        "max_images": MAX_IMAGES,
        "same": SAME,
    }
    write_page(path, "check.html", values)


def at_ranks(disputes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some of the disputes, each with its rank, twice as far down every time, and the last."""
    ranks = takewhile(lambda rank: rank < len(disputes), (10 * 2**power for power in count()))
    return [disputes[rank - 1] | {"rank": rank} for rank in (*ranks, len(disputes))] if disputes else []


def encode_picture(image: Tensor, side: int) -> dict[str, Any]:
    """An image (3, H, W) as a data: address, its width over its height, and whether it has so few pixels that they are
    better shown as squares."""
    image = shrink(image, side)
    height, width = image.shape[1:]
    small = max(height, width) < SIDE // 2
    jpeg = bytes(encode_jpeg(image.contiguous(), quality=95 if small else 80).numpy())
    address = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return {"address": address, "small": small, "aspect": width / height}


def summarise(result: dict[str, Any]) -> list[str]:
    """What was found, a line each."""
    lines = [
        *result["understood"],
        *result["suspected"],
        ", ".join(f"{len(result[kind])} {heading.lower()}" for kind, heading in KINDS.items()),
    ]
    for what, unit in (("exact", "group"), ("near", "pair")):
        groups = result[f"{what}_duplicates"]
        between, differ = (sum(group[key] for group in groups) for key in ("between_splits", "labels_differ"))
        found = f"{counted(len(groups), unit)} of {what} duplicates"
        lines.append(f"{found}, {between} between splits, {differ} under different labels")
    searched = result["near_duplicates_searched"]
    if not searched["searched"]:
        many = result["images"] > MAX_IMAGES
        reason = f"there are more than {MAX_IMAGES:,} images" if many else "no two images allow it"
        lines[-1] = f"near duplicates were not searched: {reason}"
    if searched["too_small"] or searched["too_plain"]:
        lines.append(
            f"too small to tell near duplicates: {searched['too_small']:,}; too plain: {searched['too_plain']:,}"
        )
    unusual = sum(bool(row["notes"]) for row in result["classes"])
    lines.append(f"classes that are empty, rare or differ between splits: {unusual:,}")
    labels, crop = result["labels"], result["crop"]
    if labels["note"]:
        lines.append(f"labels were not judged: {labels['note']}")
    else:
        disputes, right = labels["disputes"], percent(labels["model_accuracy"])
        wrong = f", of which about {percent(disputes[-1]['precision'], 0)} at most are wrong" if disputes else ""
        lines.append(
            f"{counted(len(disputes), 'label')} disputed{wrong}, by a quick model that guesses {right} of all labels"
        )
    if labels["of_rare_classes"] and not labels["note"]:
        few = f"{counted(labels['of_rare_classes'], 'image')} of classes with fewer than {MIN_IMAGES} images"
        lines.append(f"labels that were not judged: {few}")
    if crop["median_kept"] is not None:
        lines.append(
            f"the crop of {crop['by']} keeps {percent(crop['median_kept'])} of the median image's area, and less than "
            f"{percent(MANY, 0)} of {counted(len(crop['least_kept']), 'image')}"
        )
    if result["train_refuses"]:
        lines.append(f"to be mended first, for training refuses what is left: {result['train_refuses']}")
    return lines
