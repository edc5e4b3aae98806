"""Data as people have it: names of splits, wrappers and droppings, lists of every make, labels that look alike."""

import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from making import png

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decode import UnreadableImage, decode_image
from tokenfusion.data.describe import describe
from tokenfusion.data.labels import warn_of_lookalikes
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split_names import split_named
from tokenfusion.errors import InputError
from tokenfusion.recipe import Reading
from tokenfusion_runtime.walk import images_below

Tree = dict[str, np.ndarray]
SaveTree = Callable[[Path, Tree], Path]


def files(root: Path, *names: str) -> Path:
    """Files that need not be readable: only what they are called matters here."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def counts(source: Dataset) -> dict[str, int]:
    return dict(Counter(source.classes[label] for label in source.labels))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[("Training", "train"), ("train_set", "train"), ("Test Set", "test"), ("testset", "test"), ("val2017", "val")],
        *[(" VALID ", "val"), ("hold-out", "val"), ("Dev", "val"), ("eval", "test"), ("Validation Data", "val")],
        *[("trainer", ""), ("trains", ""), ("invalid", ""), ("contest", ""), ("test results", ""), ("", "")],
        *[
            ("01_train", "train"),
            ("Train (1)", "train"),
            ("traindata", "train"),
            ("test20", "test"),
            ("trainA", "train"),
        ],
        *[("x_test", "test"), ("valid.v1", "val"), ("Train_Set_Folder", "train"), ("TestFolder", "test")],
        *[("ＴＲＡＩＮ", "train"), ("PublicTest", "test"), ("Hold_Out", "val"), ("training_shoes", "")],
    ],
)
def test_names_of_splits(name: str, split: str) -> None:
    assert split_named(name) == split


def test_folders_of_splits_are_understood_and_said(tmp_path: Path) -> None:
    names = [f"{part}/{c}/{i}.png" for part in ("Training", "Testing") for c in ("a", "b") for i in range(3)]
    source = open_dataset(files(tmp_path, *names))
    assert source.classes == ("a", "b")
    assert "splits: Training -> train (6), Testing -> test (6)" in describe(source)
    assert describe(source)[0] == "data: 12 images of 2 classes, a 6, b 6"


@pytest.mark.parametrize(
    ("one", "two"),
    [
        *[("seg_train", "seg_test"), ("seg_train/seg_train", "seg_test/seg_test"), ("asl_train", "asl_test")],
        *[("01_train", "02_val"), ("Train (1)", "Test (1)"), ("train_256", "val_256"), ("train.v1", "valid.v1")],
    ],
)
def test_folders_that_differ_by_the_word_of_a_split(one: str, two: str, tmp_path: Path) -> None:
    source = open_dataset(files(tmp_path, *(f"{part}/{c}/1.png" for part in (one, two) for c in "ab")))
    assert source.classes == ("a", "b")
    assert Counter(source.splits)["train"] == 2
    assert f"splits: {one.split('/')[0]} -> train (2), {two.split('/')[0]} -> " in "\n".join(describe(source))


def test_folders_beside_those_of_splits_that_share_their_other_words_are_ignored(tmp_path: Path) -> None:
    names = [f"{part}/{part}/{c}/1.png" for part in ("seg_train", "seg_test") for c in "ab"]
    source = open_dataset(files(tmp_path / "1", *names, "seg_pred/seg_pred/1.png"))
    assert (source.classes, source.ignored) == (("a", "b"), 1)
    shoes = [f"{kind}_shoes/{size}/1.png" for kind in ("training", "running") for size in "ab"]
    assert open_dataset(files(tmp_path / "2", *shoes)).classes == ("running_shoes", "training_shoes")


@pytest.mark.parametrize(("one", "two"), [("fold_1", "fold_2"), ("data", "backup")])
def test_classes_that_hold_the_same_folders_are_warned_of(one: str, two: str, tmp_path: Path) -> None:
    source = open_dataset(files(tmp_path, *(f"{part}/{c}/1.png" for part in (one, two) for c in ("cat", "dog"))))
    (warning,) = (line for line in describe(source) if line.startswith("warning"))
    assert "are taken for classes, but all hold the same folders 'cat', 'dog'" in warning
    apart = open_dataset(files(tmp_path / "apart", "bus/day1/1.png", "bus/day2/1.png", "car/day1/1.png"))
    assert not any(line.startswith("warning") for line in describe(apart))


def test_splits_below_classes_and_wrappers_in_splits(tmp_path: Path) -> None:
    below = open_dataset(files(tmp_path / "1", *(f"{c}/{s}/1.png" for c in "ab" for s in ("train", "test"))))
    assert (below.classes, sorted(below.splits)) == (("a", "b"), ["test", "test", "train", "train"])
    inside = open_dataset(files(tmp_path / "2", *(f"{s}/images/{c}/1.png" for c in "ab" for s in ("train", "val"))))
    assert (inside.classes, sorted(inside.splits)) == (("a", "b"), ["train", "train", "val", "val"])


def test_splits_without_class_folders_are_no_classes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'testing', 'training' are names of splits, but images lie in them without"):
        open_dataset(files(tmp_path, "training/1.png", "testing/2.png"))


def test_a_class_that_is_called_like_a_split(tmp_path: Path) -> None:
    source = open_dataset(files(tmp_path, *(f"{name}/day{day}/1.png" for name in ("train", "bus") for day in (0, 1))))
    assert source.classes == ("bus", "train")
    assert any("'train' is taken for a class" in line for line in describe(source))


def test_wrappers_are_entered_and_droppings_left_and_counted(tmp_path: Path) -> None:
    names = [f"export/photos/{c}/{i}.png" for c in "ab" for i in range(2)]
    junk = ["__MACOSX/export/a/._0.png", "export/photos/.ipynb_checkpoints/0.png", "export/photos/a/@eaDir/0.png"]
    junk += ["$RECYCLE.BIN/x.png", "System Volume Information/y.png", "lost+found/z.png", "export/photos/a/Thumbs.db"]
    source = open_dataset(files(tmp_path, *names, *junk, "export/photos/.red/1.png"))
    assert source.names == sorted(names)
    assert source.classes == ("a", "b")
    assert source.ignored == len(junk) + 1
    assert dict(source.ignored_because) == {"hidden": 2, "left by a system or a tool": 6}
    assert any("entered 'export/photos'" in line for line in describe(source))


def test_predict_reads_what_train_reads(tmp_path: Path) -> None:
    root = files(tmp_path / "data", "a/1.png", "b/2.PNG", "b/._2.png", "b/notes.txt", "__MACOSX/a/1.png", ".c/3.png")
    files(tmp_path / "elsewhere", "4.png")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    assert images_below(str(root)) == [str(root / name) for name in open_dataset(root).names]
    assert len(open_dataset(root)) == 3


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    with pytest.raises(UnreadableImage, match=r"Git LFS.*git lfs pull"):
        decode_image(pointer, max_pixels=100)
    (tmp_path / "x.parquet").write_bytes(pointer)
    with pytest.raises(InputError, match="git lfs pull"):
        open_dataset(tmp_path / "x.parquet")


def test_classes_in_two_forms_of_unicode_are_one(tmp_path: Path) -> None:
    one, other = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    source = open_dataset(files(tmp_path, f"{one}/1.png", f"{other}/2.png", "b/1.png"))
    assert counts(source) == {"café": 2, "b": 1}


def test_classes_that_look_alike_are_warned_of(tmp_path: Path) -> None:
    source = open_dataset(files(tmp_path, "red/1.png", "Red /1.png", "rеd/2.png", "blue/1.png"))  # one е is Cyrillic
    (warning,) = (line for line in describe(source) if line.startswith("warning"))
    assert "'Red', 'red', 'rеd'" in warning
    with pytest.raises(InputError, match=r"val has labels that train lacks: 'Cat'; train has 'cat' for 'Cat'"):
        open_dataset(files(tmp_path / "x", "train/cat/1.png", "train/b/1.png", "val/Cat/1.png", "val/b/1.png"))


@pytest.mark.parametrize(
    "names",
    [("BAH", "ВАН"), ("Ill", "lll", "III"), ("Iris", "iris"), ("Вода", "вода"), ("cat-1", "cat 1", "cat1"), ("ο", "o")],
)
def test_what_looks_alike_is_one_group(names: tuple[str, ...]) -> None:  # the second BAH is Cyrillic, the first ο Greek
    (warning,) = warn_of_lookalikes([*names, "other"])
    assert all(repr(name) in warning for name in names)


def test_numbers_with_signs_are_not_alike() -> None:
    assert warn_of_lookalikes(["-1", "1", "1-1", "11", "-5", "5", "1-0", "10", "all", "ail"]) == []


def test_an_empty_class_is_left_out_with_a_warning(tmp_path: Path) -> None:
    files(tmp_path, "a/1.png", "b/1.png", "heic/1.heic")
    (tmp_path / "empty").mkdir()
    source = open_dataset(tmp_path)
    assert source.classes == ("a", "b")
    assert [line for line in source.notes if line.startswith("warning")] == [
        f"warning: class {name!r} is left out, because its folder holds no image" for name in ("empty", "heic")
    ]


ROWS = [(f"img/{c}/{i}.png", c) for c in ("red", "grün") for i in range(3)]


def listed(folder: Path, name: str, text: str, encoding: str = "utf-8", **reading: str) -> Dataset:
    files(folder, *(path for path, _ in ROWS))
    (folder / name).write_bytes(text.encode(encoding))
    return open_dataset(folder / name, reading=Reading(**reading))


def lines(separator: str = ",", head: str | None = "path,label") -> str:
    rows = [separator.join(row) for row in ROWS]
    return "\n".join(([head.replace(",", separator)] if head else []) + rows) + "\n"


@pytest.mark.parametrize(
    ("name", "text", "encoding", "said"),
    [
        ("x.csv", lines(";"), "utf-8-sig", "separated by semicolons"),
        ("x.csv", lines("\t"), "utf-8", "separated by tabs"),
        ("x.tsv", lines("\t"), "utf-16", "read as utf-16, separated by tabs"),
        ("x.csv", lines(), "utf-16-le", "read as utf-16-le, separated by commas"),
        ("x.csv", lines(), "utf-16-be", "read as utf-16-be, separated by commas"),
        ("x.csv", lines(), "utf-32", "read as utf-32, separated by commas"),
        ("x.csv", lines(), "utf-32-le", "read as utf-32-le, separated by commas"),
        ("x.csv", lines(), "utf-32-be", "read as utf-32-be, separated by commas"),
        ("x.csv", "sep=;\r\n" + lines(";"), "utf-8", "separated by semicolons"),
        ("x.csv", lines("|"), "utf-8", "separated by bars"),
        ("x.csv", lines(), "cp1252", "read as cp1252"),
        ("x.csv", lines(head=None), "utf-8", "without a header"),
        ("x.txt", lines(" ", None), "utf-8", "separated by spaces, without a header"),
        ("x.lst", "".join(f"{i}\t{c}\t{p}\n" for i, (p, c) in enumerate(ROWS)), "utf-8", "not read: 'column 1'"),
        ("x.csv", lines(head="Filename,Class"), "utf-8", "'Filename' is the path, 'Class' is the label"),
        ("x.csv", lines(head="image,label"), "utf-8", "'image' is the path"),
        ("x.csv", lines(head="file_name,category"), "utf-8", "'category' is the label"),
        ("x.csv", lines().replace("/", "\\"), "utf-8", "6 backslashes read as /"),
        ("x.json", json.dumps([{"file": p, "target": c} for p, c in ROWS]), "utf-8", "'file' is the path"),
        ("x.json", json.dumps(dict(ROWS)), "utf-8", "data: 6 images"),
        ("x.json", json.dumps({"images": [{"path": p, "label": c} for p, c in ROWS]}), "utf-8", "data: 6 images"),
        ("x.csv", lines() + lines(head=None), "utf-8", "6 exact repeats of a row, counted once"),
    ],
)
def test_lists_of_every_make(name: str, text: str, encoding: str, said: str, tmp_path: Path) -> None:
    source = listed(tmp_path, name, text, encoding)
    assert counts(source) == {"red": 3, "grün": 3}
    assert source.names == [path for path, _ in ROWS]
    assert said in "\n".join(describe(source))
    source.reader.require_there()


def test_columns_of_other_names_are_asked_for(tmp_path: Path) -> None:
    source = listed(tmp_path, "x.csv", lines(head="where,what"), path_column="where", label_column="what")
    assert counts(source) == {"red": 3, "grün": 3}
    with pytest.raises(InputError, match=r"no column 'nope' for --label-column; it has 'where', 'what'"):
        listed(tmp_path, "x.csv", lines(head="where,what"), path_column="where", label_column="nope")


@pytest.mark.parametrize("head", ["path,label,split", "path,label,Subset", "path,label,is_valid"])
def test_a_column_tells_the_splits(head: str, tmp_path: Path) -> None:
    words = ("False", "True") if "is_valid" in head else ("Training", "validation")
    text = head + "\n" + "".join(f"{p},{c},{words[i % 3 == 2]}\n" for i, (p, c) in enumerate(ROWS))
    source = listed(tmp_path, "x.csv", text)
    assert source.splits == ["train", "train", "val"] * 2
    (line,) = (line for line in describe(source) if line.startswith("splits: "))
    assert line.endswith("-> val (2)")


@pytest.mark.parametrize(
    ("column", "words", "splits"),
    [
        *[("fold", ("train", "val"), ("train", "val")), ("Usage", ("Training", "PublicTest"), ("train", "test"))],
        *[("part of it", ("train", "dev"), ("train", "val")), ("is_valid", ("", "True"), ("train", "val"))],
        *[("is_valid", ("", "False"), ("train", "train")), ("fold", ("1", "2"), ("", ""))],
    ],
)
def test_columns_that_hold_splits_alone_are_read(
    column: str, words: tuple[str, str], splits: tuple[str, str], tmp_path: Path
) -> None:
    text = f"path,label,{column}\n" + "".join(f"{p},{c},{words[i % 2]}\n" for i, (p, c) in enumerate(ROWS))
    assert listed(tmp_path, "x.csv", text).splits == list(splits) * 3


@pytest.mark.parametrize(
    ("column", "words", "reason"),
    [
        ("is_valid", ("True", "maybe"), "is_valid='maybe' is neither yes nor no"),
        ("is_valid", ("x", ""), "is_valid='x' is neither yes nor no"),
        ("valid", ("True", "False"), "does 'valid', of yes and no, tell the held-out images"),
        ("is_valid,is_test", ("True,False", "False,True"), "'is_valid', 'is_test' all tell splits"),
    ],
)
def test_flags_that_are_not_clear_are_refused(column: str, words: tuple[str, str], reason: str, tmp_path: Path) -> None:
    text = f"path,label,{column}\n" + "".join(f"{p},{c},{words[i % 2]}\n" for i, (p, c) in enumerate(ROWS))
    with pytest.raises(InputError, match=reason):
        listed(tmp_path, "x.csv", text)


def test_a_key_that_is_missing_says_no(tmp_path: Path) -> None:
    rows = [{"path": p, "label": c} | ({"is_valid": True} if i % 3 == 0 else {}) for i, (p, c) in enumerate(ROWS)]
    source = listed(tmp_path, "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert source.splits == ["val", "train", "train"] * 2


def test_folders_in_paths_tell_the_splits_of_an_image_folder_and_are_warned_of_in_a_list(tmp_path: Path) -> None:
    rows = [(f"{part}/{c}{i}.png", c) for part in ("train", "test") for c in "ab" for i in range(2)]
    files(tmp_path, *(path for path, _ in rows))
    text = "file_name,label\n" + "".join(f"{p},{c}\n" for p, c in rows)
    (tmp_path / "list.csv").write_text(text)
    alone = open_dataset(tmp_path / "list.csv")
    assert set(alone.splits) == {""}
    assert "warning: paths lie in 'test', 'train', which name splits" in "\n".join(describe(alone))
    (tmp_path / "list.csv").rename(tmp_path / "metadata.csv")
    source = open_dataset(tmp_path)
    assert source.splits == ["train"] * 4 + ["test"] * 4
    assert "splits: train -> train (4), test -> test (4)" in describe(source)


@pytest.mark.parametrize(
    ("header", "role"),
    [
        ("fname,labels", "labels"),
        ("fname,species", "label"),
        ("path,class_id", "label"),
        ("Path,ClassId", "label"),
        ("image,label_id", "label"),
        ("path,y", "label"),
    ],
)
def test_less_usual_names_of_columns_are_known(header: str, role: str, tmp_path: Path) -> None:
    source = listed(tmp_path, "x.csv", lines().replace("path,label", header))
    assert source.multi_label == (role == "labels")
    path, label = header.split(",")
    assert f"columns: {path!r} is the path, {label!r} is the {role}" in describe(source)


def test_a_usual_name_goes_before_a_less_usual_one(tmp_path: Path) -> None:
    rows = "".join(f"{p},7,{c},9\n" for p, c in ROWS)
    source = listed(tmp_path, "x.csv", "path,class_id,category,fname\n" + rows)
    assert counts(source) == {"red": 3, "grün": 3}


def test_paths_are_looked_at_before_anything_is_decoded(tmp_path: Path) -> None:
    source = listed(tmp_path, "x.csv", lines().replace(".png", ""))
    with pytest.raises(InputError, match=r"6 of 6 paths do not exist, the first are .*'img/red/0' exists with .png"):
        source.reader.require_there()
    with pytest.raises(InputError, match=r"6 of 6 paths are URLs, the first is 'https://e.org/img/red/0.png'"):
        listed(tmp_path, "x.csv", lines().replace("img/", "https://e.org/img/"))
    source = listed(tmp_path, "x.csv", lines() + "img/gone.png,red\n")
    source.reader.require_there()
    assert "warning: 1 of 7 paths do not exist, the first is 'img/gone.png'" in describe(source)


@pytest.mark.parametrize("start", ["{here}/", "/home/someone/data/", "C:\\Users\\someone\\", "../", "/"])
def test_paths_of_elsewhere_are_read_below_root(start: str, tmp_path: Path) -> None:
    text = lines().replace("img/", start.format(here=tmp_path) + "img/")
    with pytest.raises(InputError, match=r"leaves the list's folder; give .* by --root DIR"):
        listed(tmp_path, "x.csv", text)
    source = listed(tmp_path, "x.csv", text, root=str(tmp_path))
    assert source.names == [path for path, _ in ROWS]
    assert counts(source) == {"red": 3, "grün": 3}


@pytest.mark.parametrize(
    ("there", "listed_as", "hint"),
    [
        ("img/0.PNG", "img/0", "'img/0' exists with .PNG"),
        ("img/0.Png", "img/0.jpg", "'img/0.Png' exists: mend the file names' endings"),
        ("train/0.png", "Train/0.png", "'train/0.png' exists: write the paths in the list in the same small and"),
        ("img/a.JPG", "Img/A.jpg", "'img/a.JPG' exists: write the paths"),
        ("img/0.png", "img/1.png", "give the folder that they start at by --root DIR"),
        ("img/0.txt", "img/0", "give the folder that they start at by --root DIR"),
    ],
)
def test_a_missing_path_is_told_from_one_of_other_letters(
    there: str, listed_as: str, hint: str, tmp_path: Path
) -> None:
    files(tmp_path, there)
    (tmp_path / "x.csv").write_text(f"path,label\n{listed_as},a\n")
    with pytest.raises(InputError, match=re.escape(hint)):
        open_dataset(tmp_path / "x.csv").reader.require_there()


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_the_image_folder_layout(kind: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for part, some in (("train", ROWS[:2] + ROWS[3:5]), ("test", [ROWS[2], ROWS[5]])):
        files(tmp_path / part, "unlabelled.png", *(path for path, _ in some))
        if kind.endswith("jsonl"):
            text = "".join(json.dumps({"file_name": p, "label": c}) + "\n" for p, c in some)
            (tmp_path / part / kind).write_text(text)
        elif kind.endswith("csv"):
            (tmp_path / part / kind).write_text("file_name,label\n" + "".join(f"{p},{c}\n" for p, c in some))
        else:
            pq.write_table(
                pa.table({"file_name": [p for p, _ in some], "label": [c for _, c in some]}), tmp_path / part / kind
            )
    source = open_dataset(tmp_path)
    assert counts(source) == {"red": 3, "grün": 3}
    assert Counter(source.splits) == {"train": 4, "test": 2}
    assert ("not named in the metadata", 2) in source.ignored_because


@pytest.mark.parametrize(("one", "two"), [("trainset", "testset"), ("train2017", "test2017"), ("Train", "Hold-Out")])
def test_splits_of_image_folders_are_named_as_those_of_classes(one: str, two: str, tmp_path: Path) -> None:
    for part in (one, two):
        files(tmp_path / part, *(path for path, _ in ROWS))
        (tmp_path / part / "metadata.csv").write_text(lines(head="file_name,label"))
    assert Counter(open_dataset(tmp_path).splits) == {"train": 6, "val" if two == "Hold-Out" else "test": 6}


def test_the_rarest_of_many_classes_are_named(tmp_path: Path) -> None:
    names = [f"c{c:02d}/{i}.png" for c in range(20) for i in range(2 + (c != 7))]
    assert describe(open_dataset(files(tmp_path, *names)))[0].startswith(
        "data: 59 images of 20 classes, the rarest: c07 2"
    )


def test_the_awkward_cases(shared_cases: Path) -> None:
    """What `cases/README.md` says is right, for each of its folders and lists."""
    refused = {"val-case": "train has 'green'", "absolute.csv": "--root", "no-extension.csv": "exists with .png"}
    refused |= {"urls.csv": "URLs", "two-labels.csv": "stands twice"}
    held = {"training-testing": 12, "train-dev": 12, "nfd-val": 12, "training-validation.csv": 15}
    places = [*(shared_cases / "folders").iterdir(), *(p for p in (shared_cases / "lists").iterdir() if p.is_file())]
    assert len(places) == 24
    for place in places:
        if place.name in refused:
            with pytest.raises(InputError, match=re.escape(refused[place.name])):
                open_dataset(place).reader.require_there()
            continue
        source = open_dataset(place)
        source.reader.require_there()
        assert len(source.classes) == {"label-case.csv": 6, "nfd-two": 4}.get(place.name, 3), place.name
        assert sum(part in ("val", "test") for part in source.splits) == held.get(place.name, 0), place.name


@pytest.fixture(scope="session")
def shared_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = Path(__file__).parents[3] / "shared" / "cases" / "make.py"
    if not make.is_file():
        pytest.skip("no ../shared/cases/make.py")
    folder = tmp_path_factory.mktemp("cases") / "cases"
    subprocess.run([sys.executable, str(make), str(folder)], check=True)
    return folder


def test_a_picture_is_read_by_a_list_with_a_root(tmp_path: Path, picture: Callable[..., np.ndarray]) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(png(picture(1)))
    (tmp_path / "x.csv").write_text("path,label\n1.png,a\n")
    source = open_dataset(tmp_path / "x.csv", reading=Reading(root=str(tmp_path / "pictures")))
    assert np.array_equal(source.decode(0, 1000).permute(1, 2, 0).numpy(), picture(1))


def test_classes_whose_names_begin_with_a_splits_word_are_classes(tmp_path: Path) -> None:
    source = open_dataset(files(tmp_path / "a", "training_shoes/1.png", "training_shoes/2.png", "test_shoes/1.png"))
    assert counts(source) == {"training_shoes": 2, "test_shoes": 1}
    assert any(line.startswith("'test_shoes', 'training_shoes' are taken for classes") for line in describe(source))
    with pytest.raises(InputError, match="'shoes_test', 'shoes_train' are names of splits, but images lie in them"):
        open_dataset(files(tmp_path / "b", "shoes_train/1.png", "shoes_test/1.png"))
    inside = files(tmp_path / "c", *(f"{split}_shoes/{kind}/1.png" for split in ("train", "test") for kind in "ab"))
    assert open_dataset(inside).splits == ["test", "test", "train", "train"]


def test_folders_below_classes_in_an_image_folders_paths_tell_the_splits(tmp_path: Path) -> None:
    names = [f"{label}/{split}/{n}.png" for label in ("cat", "dog") for split in ("train", "test") for n in range(2)]
    files(tmp_path, *names)
    rows = "".join(f"{name},{name.split('/')[0]}\n" for name in names)
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + rows)
    assert open_dataset(tmp_path).splits == (["train"] * 2 + ["test"] * 2) * 2
