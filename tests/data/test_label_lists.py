"""Lists with several labels an image, or with weights, and how such images are held out."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.describe import describe
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import choose_split, read_split, stratified, write_split
from tokenfusion.errors import InputError


def open_csv(folder: Path, text: str) -> Dataset:
    (folder / "x.csv").write_text(text)
    return open_dataset(folder / "x.csv")


def test_a_csv_and_a_jsonl_say_the_same(tmp_path: Path) -> None:
    rows = [("a.png", ["dog", "cat"]), ("b.png", []), ("c.png", ["emu"]), ("d.png", ["cat"])]
    one = open_csv(tmp_path, "path,labels\n" + "".join(f"{path},{'|'.join(names)}\n" for path, names in rows))
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"path": p, "labels": names}) for p, names in rows))
    for source in (one, open_dataset(tmp_path / "x.jsonl")):
        assert source.multi_label
        assert source.classes == ("cat", "dog", "emu")
        assert source.labels.tolist() == [
            [True, True, False],
            [False, False, False],
            [False, False, True],
            [True, False, False],
        ]
        assert [source.label_text(index) for index in range(4)] == ["cat|dog", "", "emu", "cat"]
        assert source.weights is None


def test_a_column_label_is_one_class_whatever_it_holds(tmp_path: Path) -> None:
    source = open_csv(tmp_path, "path,label\na.png,x|y\nb.png,x\n")
    assert not source.multi_label
    assert source.classes == ("x", "x|y")


def test_a_separator_in_a_name_is_legal_where_another_separates(tmp_path: Path) -> None:
    assert open_csv(tmp_path, 'path,labels\na.png,"tench, Tinca tinca|fish"\n').classes == (
        "fish",
        "tench, Tinca tinca",
    )
    assert open_csv(tmp_path, 'path,label\na.png,"tench, Tinca tinca"\n').classes == ("tench, Tinca tinca",)


@pytest.mark.parametrize("cell", ["car person", "car;person", "car, person"])
def test_labels_separated_by_something_else_are_refused(cell: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels are separated by \|\. If it is one name, call the column label"):
        open_csv(tmp_path, f'path,labels\na.png,"{cell}"\nb.png,car\n')
    (tmp_path / "x.jsonl").write_text(json.dumps({"path": "a.png", "labels": [cell]}))
    assert open_dataset(tmp_path / "x.jsonl").classes == (cell,)  # a list says where a name ends


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,labels\na.png,x|y\nb.png,x\n", "data: 2 images of 2 classes, several labels an image, x 2, y 1"),
        ("path,x,y\na.png,1,1\nb.png,1,0\n", "data: 2 images of 2 classes, several labels an image, x 2, y 1"),
        ("path,label\na.png,x\nb.png,y\n", "data: 2 images of 2 classes, x 1, y 1"),
        (",path,label\n0;,a.png,x\n1;,b.png,y\n", "data: 2 images of 2 classes, x 1, y 1"),
    ],
)
def test_several_labels_an_image_are_said(text: str, said: str, tmp_path: Path) -> None:
    assert describe(open_csv(tmp_path, text))[0] == said


def test_weights(tmp_path: Path) -> None:
    source = open_csv(tmp_path, "path,label,weight\na.png,x,2\nb.png,y,0.5\n")
    assert source.weights is not None
    assert source.weights.tolist() == [2, 0.5]
    (tmp_path / "y.jsonl").write_text('{"path": "a.png", "label": 1, "weight": 3}\n')
    assert open_dataset(tmp_path / "y.jsonl").weights.tolist() == [3]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("path,label,weight\na.png,x,0\n", r"line 2: weight='0' is no weight; give a finite number above 0"),
        ("path,label,weight\na.png,x,1\nb.png,x,-2\n", "line 3: weight='-2' is no weight"),
        ("path,label,weight\na.png,x,nan\n", "weight='nan' is no weight"),
        ("path,label,weight\na.png,x,inf\n", "weight='inf' is no weight"),
        ("path,label,weight\na.png,x,much\n", "weight='much' is no weight"),
        ("path,label,weight\na.png,x,1\nb.png,x,\n", "'b.png' has no weight while others have one"),
        ("path,labels\na.png,x||y\n", "name each label once, none empty"),
        ("path,labels\na.png,x|x\n", "name each label once"),
        ("path,labels\na.png,\nb.png,\n", "no image has a label"),
        ("path,label,labels\na.png,x,y\n", "x.csv: has columns label and labels; keep one"),
        ("path,labels\na.png,cat;animal\nb.png,dog\n", r"'cat;animal' is a label, .* labels are separated by \|"),
        ('path,labels\na.png,"cat,animal"\nb.png,\n', "'cat,animal' is a label, and no image has more than one label"),
        ("path,labels\na.png\n", "labels=None; give every image `labels`"),
        ("path,labels,split\na.png,x,train\nb.png,x|y,val\n", "val has labels that train lacks: 'y'"),
    ],
)
def test_csv_that_cannot_be_used(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        open_csv(tmp_path, text)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"labels": "a"}, {"labels": {"a": 1}}], "line 2: labels={'a': 1}"),
        ([{"labels": ["a"]}, {"labels": [["a"]]}], "line 2: labels="),
        ([{"labels": ["a"]}, {"label": "a"}], "has columns label and labels; keep one"),
        ([{"label": "a"}, {"labels": ["a"]}], "has columns label and labels; keep one"),
        ([{"labels": ["a|b"]}], r"none empty and none with \| in it"),
        ([{"label": "a", "weight": True}], "weight=True is no weight"),
        ([{"label": "a", "weight": [1]}], r"weight=\[1\] is no weight"),
        ([{"label": "a", "weight": 10**400}], "is no weight"),
    ],
)
def test_jsonl_that_cannot_be_used(rows: list[dict[str, object]], reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"path": "a.png"} | row) for row in rows))
    with pytest.raises(InputError, match=reason):
        open_dataset(tmp_path / "x.jsonl")


def test_every_class_is_held_out_in_the_same_share() -> None:
    random = np.random.default_rng(0)
    labels = random.random((500, 6)) < np.array([0.5, 0.3, 0.1, 0.05, 0.02, 0.01])
    held_out = labels[stratified(labels, 0.2, seed=1)]
    assert abs(len(held_out) - 100) <= 4
    assert np.abs(held_out.sum(0) - 0.2 * labels.sum(0)).max() <= 1.5


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 4).flatmap(lambda k: st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=2)),
    st.sampled_from([0.05, 0.2, 0.5, 0.9]),
)
def test_a_class_that_has_images_has_one_to_train_on(rows: list[list[bool]], fraction: float) -> None:
    labels = np.array(rows)
    held_out = stratified(labels, fraction, seed=3)
    training = np.setdiff1d(np.arange(len(rows)), held_out)
    assert (labels[training].any(0) == labels.any(0)).all()
    assert np.array_equal(held_out, stratified(labels, fraction, seed=3))


def test_a_split_of_images_with_several_labels_is_read_back(tmp_path: Path) -> None:
    cells = ["a|b", "", "b", "a", "c|a", "b|c", "", "c", "a|b|c", "b"]
    source = open_csv(tmp_path, "path,labels\n" + "".join(f"{n}.png,{cell}\n" for n, cell in enumerate(cells)))
    split = choose_split(source, 0.3, seed=0)
    write_split(tmp_path / "split.csv", source, split)
    assert (tmp_path / "split.csv").read_text().startswith("path,labels,split\n")
    again = read_split(tmp_path / "split.csv", source)
    assert np.array_equal(again.train, split.train)
    assert np.array_equal(again.val, split.val)
    assert 2 <= len(split.val) <= 4
    changed = open_csv(tmp_path, (tmp_path / "x.csv").read_text().replace("a|b|c", "a|b"))
    with pytest.raises(InputError, match=r"image 8 was \['8.png', 'a\|b\|c'\] .* and is \['8.png', 'a\|b'\] now"):
        read_split(tmp_path / "split.csv", changed)


def test_images_that_leave_nothing_to_hold_out(tmp_path: Path) -> None:
    source = open_csv(tmp_path, "path,labels\n0.png,a\n1.png,b\n")
    with pytest.raises(InputError, match="no class has two images, one to train on and one to hold out"):
        choose_split(source, 0.2, seed=0)
