import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from making import LIMIT, pixels_of, png, write_parquet

from tokenfusion.data.decode import UnreadableImage
from tokenfusion.data.open import open_dataset
from tokenfusion.errors import InputError
from tokenfusion.recipe import Reading

Tree = dict[str, np.ndarray]
SaveTree = Callable[[Path, Tree], Path]


def test_csv_splits_and_odd_names(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(
        tmp_path, {"a b/new\nline,1.png": pets["cat/1.png"], "c.png": pets["dog/1.png"], "d.png": pets["dog/2.png"]}
    )
    (tmp_path / "x.csv").write_text(
        'path,label,split\n"a b/new\nline,1.png",Ä,train\nc.png,b,Train\n./c.png,b,training\nd.png,b,valid\n'
    )
    source = open_dataset(tmp_path / "x.csv")
    assert source.classes == ("b", "Ä")
    assert source.splits == ["train", "train", "val"]
    assert source.names == ["a b/new\nline,1.png", "c.png", "d.png"]
    assert np.array_equal(pixels_of(source, 0), pets["cat/1.png"])


def test_a_number_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"path": "a.png", "label": ' + "9" * 5_000 + "}")
    with pytest.raises(InputError, match="line 1: not JSON"):
        open_dataset(tmp_path / "x.jsonl")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.png", "a/../../x.png", ".."])
def test_a_list_may_not_leave_its_folder(path: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"path,label\nok.png,a\n{path},b\n")
    with pytest.raises(InputError, match=r"line 3: path='.*' leaves the list's folder"):
        open_dataset(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("thing,label\nx,a\n", "columns are 'thing', 'label', none of which .* --path-column NAME"),
        ("filename,image,label\nx.png,y.png,a\n", "which of 'filename', 'image' is the path.* --path-column filename"),
        ("path,class,category\nx.png,a,b\n", "which of 'class', 'category' is the label.* --label-column class"),
        ("path,genus\nx.png,a\n", "none of which is known as the label; say which by --label-column NAME"),
        ("", "its first line is empty; it must name the columns"),
        ("\n\n", "its first line is empty"),
        ("path,label\nx.png,a,b\n", "line 2: 3 cells, where the first line has 2"),
        ("path,label\nx.png,a\nx.png,b\n", r"'x.png' stands twice, with label 'a' and 'b' \(line 2 and line 3\)"),
        ("path,label,split\nx.png,a,train\n./x.png,a,val\n", "'x.png' stands twice, with split 'train' and 'val'"),
        ("path,label\nx.png,0\ny.png,1\nz.png,-1\n", "line 4: label -1 stands for no label"),
        ("path,lable\nx.png,a\n", "column 'lable' is not known; did you mean label?"),
        ("path,label,weigth\nx.png,a,2\n", "x.csv: column 'weigth' is not known; did you mean weight?"),
        ("path,label\n", "no image found"),
        ("path,label\nx.png,\n", "line 2: label=''"),
        ("path,label\nx.png\n", "line 2: label=None"),
        ("path,label,split\nx.png,a,later\n", "line 2: split='later' is not known; choose train"),
        ("path,label,split\nx.png,a,train\ny.png,b,\n", "'y.png' is in no split while others are"),
        ('path,label\n"x.png,a\n', "cannot be read"),
    ],
)
def test_csv_that_cannot_be_used(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=reason):
        open_dataset(tmp_path / "x.csv")


def test_columns_of_other_names_are_left_alone(tmp_path: Path) -> None:
    # a height is no misspelt weight, and `labels2` no other `label` where there is one
    (tmp_path / "x.csv").write_text("path,label,height,labels2,photographer\nx.png,a,48,b,c\ny.png,b,48,b,c\n")
    source = open_dataset(tmp_path / "x.csv")
    assert source.classes == ("a", "b")
    assert source.weights is None


def test_jsonl_labels_may_be_numbers_and_names_anything(tmp_path: Path, pets: Tree, save_tree: SaveTree) -> None:
    save_tree(tmp_path, {"new\nline.png": pets["cat/1.png"]})
    rows = [
        {"path": "new\nline.png", "label": 3},
        {"path": "nul\0.png", "label": 10},
        {"path": "\ud800.png", "label": 3},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    source = open_dataset(tmp_path / "x.jsonl")
    assert source.classes == ("10", "3")
    assert np.array_equal(pixels_of(source, 0), pets["cat/1.png"])
    for index in (1, 2):
        source.names[index].encode()
        with pytest.raises(UnreadableImage, match="cannot be read"):
            source.decode(index, LIMIT)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "not JSON"),
        ("[1]", "is not like"),
        ('{"path": "x.png"}', "label=None"),
        ("[" * 9999, "not JSON"),
    ],
)
def test_jsonl_that_cannot_be_used(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"path": "a.png", "label": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match=f"line 2: .*{reason}"):
        open_dataset(tmp_path / "x.jsonl")


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.txt"])
def test_a_huge_line_is_refused_before_it_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b"path,label\na.png,a\n")
        file.truncate(2**33)  # eight gigabytes of nothing, which the disk does not hold
    with pytest.raises(InputError, match=r"line 3: more than 1,048,576 bytes"):
        open_dataset(path)
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(InputError, match="8,589,934,592 bytes, more than 268,435,456 of one JSON; write a JSONL"):
        open_dataset(tmp_path / "x.json")


def test_long_cells_are_named_by_their_beginnings(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    long = "é" * 100_000
    texts = {
        "label.csv": f"path,label\na.png,{long}\nb.png,b\n",
        "path.csv": f"path,label\n{long},a\nb.png,b\n",
        "split.csv": f"path,label,split\na.png,a,{long}\nb.png,b,train\n",
        "x.jsonl": json.dumps({"path": "a.png", "label": long}) + "\n",
        "y.jsonl": json.dumps({"path": "a.png", "labels": [long]}) + "\n",
        "z.jsonl": json.dumps({"path": "a.png", "label": "a", long: 1}) + "\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        status, output, errors = command("check", tmp_path / name, "--out", tmp_path / "out")
        assert status == 2
        assert len(output + errors) < 40_000, name
    with pytest.raises(InputError, match=r"line 2: a path of 100,000 characters, 'é{40}' \.\.\.; mend the row"):
        open_dataset(tmp_path / "path.csv")
    (tmp_path / "long.csv").write_text(f"path,label\na.png,{long[:1001]}\nb.png,b\n")
    with pytest.raises(InputError, match="is no name of a class; give one of up to 1000 characters"):
        open_dataset(tmp_path / "long.csv")


def test_labels_with_bars_are_several_or_warned_of_and_empty_rows_of_excel_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("Image Index,Finding Labels,x\na.png,Mass|Edema,\nb.png,Edema,\n,,\n,,\n")
    source = open_dataset(tmp_path / "x.csv", reading=Reading(label_column="Finding Labels"))
    assert source.multi_label
    assert source.classes == ("Edema", "Mass")
    (tmp_path / "x.csv").write_text("path,label\na.png,Mass|Edema\nb.png,Edema\n")
    assert "warning: 'Mass|Edema' of 'label' is taken for one label" in "\n".join(
        open_dataset(tmp_path / "x.csv").notes
    )


def test_a_column_that_numbers_the_rows_is_no_label(tmp_path: Path) -> None:
    (tmp_path / "images.txt").write_text("1 a/x.png\n2 a/y.png\n3 b/z.png\n")
    with pytest.raises(InputError, match="which is the label is not clear"):
        open_dataset(tmp_path / "images.txt")


def test_the_column_of_image_files_is_the_path_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("\n\nname,label,is_valid\na.png,3,False\nb.png,7,False\nc.png,3,True\n")
    source = open_dataset(tmp_path / "x.csv")
    assert (source.names, source.splits) == (["a.png", "b.png", "c.png"], ["train", "train", "val"])
    assert "columns: 'name' is the path, 'label' is the label, 'is_valid' is the split" in source.notes


def test_paths_by_labels_and_file_urls_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"cat": ["a.png", "b.png"], "dog": ["c.png"]}))
    source = open_dataset(tmp_path / "x.json")
    assert (source.names, source.classes, source.labels.tolist()) == (
        ["a.png", "b.png", "c.png"],
        ("cat", "dog"),
        [0, 0, 1],
    )
    pairs = [["a.png", "cat"], ["b.png", "dog"]]
    for value in (pairs, [["path", "label"], *pairs], {"columns": ["path", "label"], "index": [0, 1], "data": pairs}):
        (tmp_path / "x.json").write_text(json.dumps(value))
        source = open_dataset(tmp_path / "x.json")
        assert (source.names, source.classes) == (["a.png", "b.png"], ("cat", "dog"))
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "x.csv").write_text(f"path,label\nfile://{tmp_path}/a.png,cat\n")
    assert open_dataset(tmp_path / "x.csv", reading=Reading(root=str(tmp_path))).names == ["a.png"]


@pytest.mark.parametrize("parquet", [False, True])
def test_columns_that_may_tell_groups_are_warned_of(parquet: bool, tmp_path: Path) -> None:
    patients = ["p1", "p1", "p2", "p3"]
    if parquet:
        images = [png(np.full((4, 4, 3), n, np.uint8)) for n in range(4)]
        write_parquet(tmp_path / "x.parquet", images, ["a", "b", "a", "b"], Patient_ID=patients, video=[1, 2, 3, 4])
        source = open_dataset(tmp_path / "x.parquet")
    else:
        rows = "".join(f"{n}.png,{'ab'[n % 2]},{patient},{n}\n" for n, patient in enumerate(patients))
        (tmp_path / "x.csv").write_text("path,label,Patient_ID,video\n" + rows)
        source = open_dataset(tmp_path / "x.csv")
    warned = [line for line in source.notes if line.startswith("warning: ")]
    assert len(warned) == 1
    assert warned[0].startswith("warning: 'Patient_ID' may tell pictures of one thing")
