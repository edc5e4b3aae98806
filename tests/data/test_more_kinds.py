"""Data as people have it, once more: what was found by inventing other inputs of the kinds that are known."""

import json
from pathlib import Path
from typing import Any

import pytest
from making import write_tar

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.describe import describe
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import choose_split
from tokenfusion.errors import InputError

ROWS = [(f"img/{number}.png", "cat" if number < 3 else "dog") for number in range(6)]


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def listed(root: Path, name: str, text: str) -> Dataset:
    put(root, *(path for path, _ in ROWS))
    (root / name).write_text(text, encoding="utf-8")
    return open_dataset(root / name)


def labels_of(source: Dataset) -> list[str]:
    return [source.label_text(index) for index in range(len(source))]


def test_remarks_before_the_first_line_are_passed_over_and_a_header_with_such_a_sign_is_none(tmp_path: Path) -> None:
    rows = "".join(f"{path},{label}\n" for path, label in ROWS)
    remarks = [
        "# made by hand\n# second version\n",
        "# made on 1 May, by me\n\n",
        "# at https://example.org/a.jpg; mine\n",
    ]
    remarks += ['"# made on 1 May, by me",\n']  # as Excel writes it
    heads = [
        "#path,label\n",
        "# image, label and split\npath,label\n",
        "# made on 1 May, by me\n#path,label\n",
        *remarks,
    ]
    for head in (*heads, "path,label\n", *(f"{remark}path,label\n" for remark in remarks)):
        assert labels_of(listed(tmp_path, "x.csv", head + rows)) == [label for _, label in ROWS]
    with pytest.raises(InputError, match=r"x\.csv, line 9: 3 cells"):
        listed(tmp_path, "x.csv", f"# remark, one\npath,label\n{rows}a,b,c\n")


def test_images_whose_names_begin_with_the_sign_of_remarks_are_images(tmp_path: Path) -> None:
    put(tmp_path, "#1.png", "#2 b.png")
    for separator in ", ":
        (tmp_path / "x.txt").write_text(f"#1.png{separator}cat\n")
        assert open_dataset(tmp_path / "x.txt").names == ["#1.png"]
    (tmp_path / "x.csv").write_text("#2 b.png,cat\n#1.png,dog\n")
    assert open_dataset(tmp_path / "x.csv").names == ["#2 b.png", "#1.png"]


def test_labels_that_are_whole_numbers_are_read_without_a_fraction(tmp_path: Path) -> None:
    def classes(*labels: str) -> tuple[str, ...]:
        rows = zip((path for path, _ in ROWS), labels, strict=False)
        return listed(tmp_path, "x.csv", "path,label\n" + "".join(f"{path},{label}\n" for path, label in rows)).classes

    assert classes("0.0", "1.0", "0", "1.00") == ("0", "1")
    assert classes("0.0", "1.5", "1.0") == ("0.0", "1.0", "1.5")
    assert classes("0.0", "1.0", "cat") == ("0.0", "1.0", "cat")
    pixels = "".join(f"{path},{label}\n" for (path, _), label in zip(ROWS, ["0.0", "1.0"] * 3, strict=True))
    source = listed(tmp_path, "x.csv", f"path,label\n{pixels}")
    assert "labels are whole numbers: '0.0' is read as '0'" in source.notes
    several = [{"path": path, "labels": ["0.0", "2.0"][: 1 + n % 2]} for n, (path, _) in enumerate(ROWS)]
    assert listed(tmp_path, "x.jsonl", "\n".join(map(json.dumps, several))).classes == ("0", "2")


@pytest.mark.parametrize("kind", ["objects", "labels by paths"])
def test_a_json_of_splits_is_read(kind: str, tmp_path: Path) -> None:
    parts: dict[str, Any] = {"Training": ROWS[::2], "Test": ROWS[1::2]}
    for name, part in parts.items():
        objects = [{"image": path, "label": label} for path, label in part]
        parts[name] = objects if kind == "objects" else dict(part)
    source = listed(tmp_path, "x.json", json.dumps(parts))
    assert source.splits == ["train"] * 3 + ["test"] * 3
    assert labels_of(source) == [label for _, label in (*ROWS[::2], *ROWS[1::2])]
    assert "splits: Training -> train (3), Test -> test (3)" in describe(source)


def test_a_json_of_paths_by_splits_is_not_one_of_classes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'train' is the name of a split, not of a class, and holds no labels"):
        listed(tmp_path, "x.json", json.dumps({"train": [ROWS[0][0]], "val": [ROWS[1][0]]}))
    by_label = json.dumps({"cat": [path for path, _ in ROWS[:3]], "dog": [path for path, _ in ROWS[3:]]})
    assert labels_of(listed(tmp_path, "x.json", by_label)) == [label for _, label in ROWS]


def test_an_image_as_hugging_faces_library_writes_it_to_json_is_its_path(tmp_path: Path) -> None:
    lines = [json.dumps({"image": {"bytes": None, "path": path}, "label": label}) for path, label in ROWS]
    assert labels_of(listed(tmp_path, "x.jsonl", "\n".join(lines))) == [label for _, label in ROWS]


@pytest.mark.parametrize("name", ["unlabeled", "Not labelled", "no_label", "unsorted", "-1"])
def test_a_class_folder_that_may_be_none_is_warned_of(name: str, tmp_path: Path) -> None:
    source = open_dataset(put(tmp_path, "0/1.png", "1/2.png", f"{name}/3.png"))
    assert f"warning: {name!r} is a class here, and may stand for a missing label" in describe(source)


def test_minus_1_and_1_are_two_class_folders(tmp_path: Path) -> None:
    assert not any("missing label" in line for line in describe(open_dataset(put(tmp_path, "-1/1.png", "1/2.png"))))


@pytest.mark.parametrize("column", ["a{}", "part_1\\a{}.png", "a{}.png"])
def test_a_list_that_may_label_the_images_of_folders_is_warned_of(column: str, tmp_path: Path) -> None:
    folder = put(tmp_path / "x", *(f"part_{1 + number % 2}/a{number}.png" for number in range(6)))
    rows = "".join(f"{column.format(number)},{'nv' if number < 3 else 'mel'}\n" for number in range(6))
    (folder / "metadata.csv").write_text(f"image_id,dx\n{rows}")
    warned = any(
        "'metadata.csv' names these images, and is not read" in line for line in describe(open_dataset(folder))
    )
    assert warned == ("part_1" not in column)
    (folder / "metadata.csv").write_text("lesion,site\n1,arm\n2,leg\n")
    assert not any("names these images" in line for line in describe(open_dataset(folder)))


@pytest.mark.parametrize(("packed", "remedy"), [(False, "give that"), (True, "unpack it and give that")])
def test_a_single_class_beside_a_list_has_a_remedy(packed: bool, remedy: str, picture, tmp_path: Path) -> None:
    place = put(tmp_path / "x", "images/1.png", "images/2.png", "labels.csv")
    if packed:
        import tarfile

        place = write_tar(tmp_path / "x.tar", {"images/1.png": picture(1), "images/2.png": picture(2)})
        with tarfile.open(place, "a") as tar:
            tar.add(tmp_path / "x" / "labels.csv", "labels.csv")
    with pytest.raises(InputError, match=f"a single class, 'images'.*; if 'labels.csv' in it labels .*, {remedy}"):
        choose_split(open_dataset(place), 0.2, 0)


def test_a_spreadsheet_is_to_be_saved_as_csv(tmp_path: Path) -> None:
    put(tmp_path, "x.xlsx")
    with pytest.raises(InputError, match=r"x\.xlsx: a spreadsheet; save it as CSV"):
        open_dataset(tmp_path / "x.xlsx")
