"""What programs that mark things in images write as JSON: COCO's is read, others are refused by name."""

from pathlib import Path
from typing import Any

from tokenfusion.errors import InputError

OTHERS = {
    "VGG's Image Annotator": ({"_via_img_metadata"}, {"filename", "regions"}),
    "Labelme": ({"imagePath", "shapes"},),
    "Label Studio": ({"data", "annotations"}, {"data", "completions"}, {"data", "predictions"}),
    "CreateML": ({"image", "annotations"}, {"imagefilename", "annotation"}),
    "Labelbox": ({"data_row", "projects"}, {"Labeled Data", "Label"}),
}
"""Programs whose JSON is no list of images and labels, and the keys that tell it."""


def is_coco(value: object) -> bool:
    """Whether a JSON is in the format of COCO."""
    names = ("images", "annotations", "categories")
    return isinstance(value, dict) and all(isinstance(value.get(name), list) for name in names)


def refuse_others(path: Path, value: object) -> None:
    """Refuse a JSON of a program that marks things in images, by its name."""
    first = value[0] if isinstance(value, list) and value else value
    first = next(iter(first.values())) if isinstance(first, dict) and path_of_region(first) else first
    for program, kinds in OTHERS.items():
        if isinstance(first, dict) and any(keys <= first.keys() for keys in kinds):
            raise InputError(
                f"{path}: is in the format of {program}, which marks things in images; write each image and its label "
                "to a list, such as a CSV of path,label"
            )


def path_of_region(value: dict[str, Any]) -> bool:
    """Whether every value is an image's regions, as VGG's Image Annotator exports them."""
    return bool(value) and all(isinstance(image, dict) and "regions" in image for image in value.values())


def rows_of_coco(path: Path, value: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """A row an image, with the categories that are marked in it, and what was understood.

    Where every image has exactly one annotation and none has a box, the category is its one label; else an image has
    any number of labels.

    Raises:
        InputError: an annotation is of no image, or of no category, or one of these has no name.
    """
    try:
        names = {category["id"]: str(category["name"]) for category in value["categories"]}
        images = {image["id"]: str(image["file_name"]) for image in value["images"]}
        marked: dict[Any, list[str]] = {image: [] for image in images}
        for annotation in value["annotations"]:
            marked[annotation["image_id"]].append(names[annotation["category_id"]])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is in the format of COCO, but {error} is missing among its images, categories or their fields; "
            "mend it, or write path,label of each image to a CSV"
        ) from error
    boxes = any(annotation.get("bbox") or annotation.get("segmentation") for annotation in value["annotations"])
    if not boxes and images and all(len(labels) == 1 for labels in marked.values()):
        said = "the category of each image's annotation is its label"
        return [{"path": images[image], "label": label} for image, (label,) in marked.items()], said
    said = "the categories of an image's annotations are its labels; where they lie is not used"
    return [{"path": images[image], "labels": sorted({*labels})} for image, labels in marked.items()], said
