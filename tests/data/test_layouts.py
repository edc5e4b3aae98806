"""Layouts made at random out of the kinds in which people have their data, and what must hold of each."""

import csv
import io
import json
import random
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.describe import describe
from tokenfusion.data.open import open_dataset

CLASSES = (
    "cat",
    "dog",
    "Café au lait",
    "grün",
    "Ünal-Öz",
    "long_horn beetle",
    "T-shirt",
    "猫",
    "ёж",
    "no",
    "day",
    "x.y",
)
TRAIN = ("train", "Training", "TRAIN ", "train_set", "trn", "Train Data")
HELD_OUT = {
    "val": ("val", "Valid", "validation", "dev", "val2017", "hold-out", "VALID set"),
    "test": ("test", "Testing", "test_images", "eval", "Test Set"),
}
WRAPPERS = ("photos", "export (1)", "my data", "images", "Archive")
NESTED = ("night", "2024-05", "batch 1", "raw", "IMG")
DROPPINGS = ("__MACOSX/{0}/._1.png", "$RECYCLE.BIN/9.png", "@eaDir/2.jpg", ".DS_Store", "Thumbs.db", "lost+found/7.png")
OTHERS = ("README.txt", "notes.md", ".hidden/3.png", "._4.png", "desktop.ini", ".ipynb_checkpoints/5.png")
ENDINGS = (".png", ".JPG", ".jpeg", ".tif", ".webp", ".PNG")


@dataclass(frozen=True)
class Photo:
    """An image, and what a person says of it."""

    path: str
    label: str
    split: str


@dataclass(frozen=True)
class Layout:
    """Files below a folder: photos, and what is none."""

    photos: tuple[Photo, ...]
    junk: tuple[str, ...]
    wrapper: str = ""
    """The first folder of those around everything, with a slash."""


def written(random: random.Random, name: str) -> str:
    """A name as one of the systems writes it."""
    return unicodedata.normalize(random.choice(("NFC", "NFD")), name)


@st.composite
def layouts(draw: Callable[..., object]) -> Layout:
    """A tree of class folders with or without splits, wrappers, deeper folders, droppings and other files."""
    rng: random.Random = draw(st.randoms(use_true_random=False))  # type: ignore[assignment]
    classes = rng.sample(CLASSES, rng.randint(2, 4))
    wrapper = "".join(f"{name}/" for name in rng.sample(WRAPPERS, rng.choice((0, 0, 1, 2))))
    order = rng.choice(("none", "above", "below"))
    held_out = rng.choice(("val", "test"))
    names = {"train": rng.choice(TRAIN), held_out: rng.choice(HELD_OUT[held_out])} if order != "none" else {"": ""}
    photos, folders = [], {""}
    for split, called in names.items():
        for label in classes:
            folder = written(rng, label)
            parts = {"none": [folder], "above": [called, folder], "below": [folder, called]}[order]
            for number in range(rng.randint(1, 3)):
                deeper = rng.sample(NESTED, rng.choice((0, 0, 1, 2)))
                place = wrapper + "/".join([*parts, *deeper])
                folders.add(f"{place}/")
                photos.append(Photo(f"{place}/{split}{number}{rng.choice(ENDINGS)}", label, split))
    junk = {
        rng.choice(sorted(folders)) + name.format(written(rng, classes[0]))
        for name in rng.sample(DROPPINGS + OTHERS, rng.randint(0, 4))
    }
    return Layout(tuple(photos), tuple(sorted(junk)), wrapper[: wrapper.find("/") + 1])


def write_files(root: Path, layout: Layout) -> Path:
    for path in (*(photo.path for photo in layout.photos), *layout.junk):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def holds(source: Dataset, layout: Layout, files: int) -> None:
    """Every image is used or held out, or counted as left out with a reason; labels are what a person says."""
    found = {name: (source.label_text(index), source.splits[index]) for index, name in enumerate(source.names)}
    assert found == {photo.path: (photo.label, photo.split) for photo in layout.photos}
    assert len(source) + source.ignored == files
    assert sum(count for _, count in source.ignored_because) == source.ignored
    lines = describe(source)
    assert lines[0].startswith(f"data: {len(layout.photos)} image")
    assert ("splits: " in "\n".join(lines)) == any(photo.split for photo in layout.photos)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layouts())
def test_folders(layout: Layout) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = write_files(Path(folder) / "data", layout)
        holds(open_dataset(root), layout, len(layout.photos) + len(layout.junk))


@settings(max_examples=75, deadline=None, derandomize=True)
@given(layouts(), st.sampled_from((".tar", ".tar.gz", ".tgz", ".tar.xz")))
def test_tars(layout: Layout, ending: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"data{ending}"
        with tarfile.open(path, "w:" + {".tar": "", ".tar.xz": "xz"}.get(ending, "gz")) as tar:
            for name in (*(photo.path for photo in layout.photos), *layout.junk):
                member = tarfile.TarInfo(name)
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))
        entered = [Photo(photo.path.removeprefix(layout.wrapper), photo.label, photo.split) for photo in layout.photos]
        holds(open_dataset(path), Layout(tuple(entered), ()), len(layout.photos) + len(layout.junk))


PATHS = ("path", "file", "Filename", "file_name", "image", "Image Path", "img")
LABELS = ("label", "class", "Category", "target", "class_name")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "cp1252")


@st.composite
def lists(draw: Callable[..., object]) -> tuple[Layout, str, bytes]:
    """A list of a layout's photos as some program writes it: its name and its bytes."""
    layout: Layout = draw(layouts())  # type: ignore[assignment]
    rng: random.Random = draw(st.randoms(use_true_random=False))  # type: ignore[assignment]
    rows = [[written_path(rng, photo.path), rng.choice(("", " ")) + photo.label] for photo in layout.photos]
    head = [rng.choice(PATHS), rng.choice(LABELS)]
    if any(photo.split for photo in layout.photos):
        words = {photo.split: rng.choice((TRAIN, *HELD_OUT.values())) for photo in layout.photos}
        words = {split: rng.choice(TRAIN if split == "train" else HELD_OUT[split]) for split in words}
        head.append(rng.choice(("split", "Subset", "set", "partition")))
        rows = [[*row, words[photo.split]] for row, photo in zip(rows, layout.photos, strict=True)]
    named = rng.random() < 0.8
    if named and rng.random() < 0.3:
        head.insert(0, "note")
        rows = [[f"n{number}", *row] for number, row in enumerate(rows)]
    if named and rng.random() < 0.3:
        objects = [dict(zip(head, row, strict=True)) for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in objects)
        return (
            (layout, "x.jsonl", text.encode())
            if rng.random() < 0.5
            else (layout, "x.json", json.dumps(objects).encode())
        )
    file = io.StringIO()
    separator = rng.choice((",", ";", "\t", "|"))
    csv.writer(file, delimiter=separator, lineterminator=rng.choice(("\n", "\r\n"))).writerows([head] * named + rows)
    text = (f"sep={separator}\n" if named and rng.random() < 0.2 else "") + file.getvalue()
    fits = [encoding for encoding in ENCODINGS if can_be(text, encoding)]
    return layout, rng.choice(("x.csv", "x.txt", "x.tsv")), text.encode(rng.choice(fits))


def can_be(text: str, encoding: str) -> bool:
    try:
        return bool(text.encode(encoding))
    except UnicodeEncodeError:
        return False


def written_path(rng: random.Random, path: str) -> str:
    """A path as one of the systems writes it."""
    path = written(rng, path)
    return rng.choice((path, path, f"./{path}", path.replace("/", "\\")))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(lists())
def test_lists(made: tuple[Layout, str, bytes]) -> None:
    layout, name, data = made
    with tempfile.TemporaryDirectory() as folder:
        root = write_files(Path(folder), layout)
        (root / name).write_bytes(data)
        source = open_dataset(root / name)
        source.reader.require_there()
        holds(source, Layout(layout.photos, ()), len(layout.photos))
