"""JSON of programs that mark things in images."""

import json
from pathlib import Path
from typing import Any

import pytest

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.describe import describe
from tokenfusion.data.open import open_dataset
from tokenfusion.errors import InputError

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def opened(folder: Path, value: Any) -> Dataset:
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(b"x")
    (folder / "x.json").write_text(json.dumps(value))
    return open_dataset(folder / "x.json")


def coco(annotations: list[dict[str, Any]]) -> dict[str, Any]:
    images = [{"id": 10 + number, "file_name": f"{number}.jpg", "width": 8} for number in range(4)]
    return {"info": {}, "licenses": [], "images": images, "categories": CATEGORIES, "annotations": annotations}


def test_categories_of_coco_are_labels(tmp_path: Path) -> None:
    box = {"bbox": [0, 0, 2, 2], "iscrowd": 0}
    marked = [(10, 3), (10, 7), (10, 7), (11, 7), (13, 3)]
    source = opened(tmp_path, coco([{"image_id": image, "category_id": kind} | box for image, kind in marked]))
    assert source.multi_label
    assert [source.label_text(index) for index in range(4)] == ["cat|dog", "dog", "", "cat"]
    said = "x.json: read as COCO's format: the categories of an image's annotations are its labels; where they lie"
    assert any(line.startswith(said) for line in describe(source))


def test_one_category_an_image_without_boxes_is_its_label(tmp_path: Path) -> None:
    source = opened(tmp_path, coco([{"image_id": 10 + n, "category_id": 3 + 4 * (n % 2)} for n in range(4)]))
    assert [source.label_text(index) for index in range(4)] == ["cat", "dog", "cat", "dog"]
    assert not source.multi_label


@pytest.mark.parametrize("annotation", [{"image_id": 99, "category_id": 3}, {"image_id": 10, "category_id": 1}, {}, 3])
def test_a_coco_file_that_fits_not_together_is_refused_as_one(annotation: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is in the format of COCO, but "):
        opened(tmp_path, coco([annotation]))


@pytest.mark.parametrize(
    ("program", "value"),
    [
        ("VGG's Image Annotator", {"_via_settings": {}, "_via_img_metadata": {}, "_via_attributes": {}}),
        ("VGG's Image Annotator", {"0.jpg9": {"filename": "0.jpg", "size": 9, "regions": [], "file_attributes": {}}}),
        ("Labelme", {"version": "5", "shapes": [], "imagePath": "0.jpg", "imageData": None}),
        ("Label Studio", [{"id": 1, "data": {"image": "0.jpg"}, "annotations": [{"result": []}]}]),
        ("CreateML", [{"image": "0.jpg", "annotations": [{"label": "cat", "coordinates": {}}]}]),
        ("Labelbox", [{"data_row": {"external_id": "0.jpg"}, "projects": {}}]),
    ],
)
def test_other_programs_are_named_with_a_remedy(program: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"is in the format of {program}, which marks .*; write each image and its"):
        opened(tmp_path, value)
