"""The data check-up finds what is wrong, and says no more than that."""

import base64
import csv
import io
import json
import os
import re
import shlex
import shutil
import struct
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2 import functional as F

from runs import small_recipe
from tokenfusion.check.checkup import free_run
from tokenfusion.check.classes import count_classes
from tokenfusion.check.crop import kept
from tokenfusion.check.duplicates import exact_duplicates, near_duplicates
from tokenfusion.check.inspection import Inspection, inspect_images
from tokenfusion.check.labels import choose_judged, judge_labels, thumbnail_features
from tokenfusion.check.quarantine import connected
from tokenfusion.data.describe import describe
from tokenfusion.data.exclude import keep_list
from tokenfusion.data.open import open_dataset
from tokenfusion.data.preprocess import cover
from tokenfusion.errors import InputError
from tokenfusion.evaluate import evaluate
from tokenfusion.report.pictures import shrink
from tokenfusion.training import resume, start


@cache
def scene(seed: int, height: int = 96, width: int = 120) -> Image.Image:
    """A picture with coarse and fine structure."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    pixels = sum(gaussian_filter(noise, (s, s, 0)) * s for s in (1.5, 5, 14))
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    return Image.fromarray((255 * pixels).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def data(tmp_path):
    """Twenty-four sound pictures of two classes in train and val."""
    for seed in range(24):
        folder = tmp_path / "photos" / ("val" if seed >= 16 else "train") / "ab"[seed % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{seed}.jpg").write_bytes(encoded(scene(seed)))
    return tmp_path / "photos"


def checked(command, data, tmp_path):
    status, output, errors = command("check", data, "--out", tmp_path / "found", "--json")
    assert status == 0, errors
    result = json.loads(output)
    assert result == json.loads((tmp_path / "found" / "check.json").read_text())
    return result


def quarantined(tmp_path):
    with open(tmp_path / "found" / "quarantine.csv", newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def test_sound_images_raise_no_alarm(command, data, tmp_path):
    result = checked(command, data, tmp_path)
    assert result["images"] == 24
    assert result["splits"] == {"train": 16, "val": 8}
    for kind in ("unreadable", "tiny", "huge", "animated", "odd_colour", "exact_duplicates", "near_duplicates"):
        assert result[kind] == [], kind
    assert quarantined(tmp_path) == {}
    assert sorted(path.name for path in data.parent.iterdir()) == ["found", "photos"]  # nothing beside or inside it


def without_second_size(tiff: bytes) -> bytes:
    """A little-endian TIFF whose second frame does not say its width."""
    (first,) = struct.unpack_from("<I", tiff, 4)
    (entries,) = struct.unpack_from("<H", tiff, first)
    (second,) = struct.unpack_from("<I", tiff, first + 2 + 12 * entries)
    place = second + 2
    assert struct.unpack_from("<H", tiff, place) == (256,)  # ImageWidth, the lowest tag there is
    return tiff[:place] + struct.pack("<H", 255) + tiff[place + 2 :]


def test_every_kind_of_fault_is_found_under_its_name(command, data, tmp_path):
    jpeg, folder = encoded(scene(99)), data / "train" / "a"
    faults = {
        "empty.jpg": b"",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "text.jpg": b"this is no image at all",
        "tiny.png": encoded(scene(30, 9, 7), "PNG"),
        "huge.png": encoded(Image.new("RGB", (961, 40)), "PNG"),
        "cmyk.jpg": encoded(scene(31).convert("CMYK")),
        "deep.png": encoded(Image.fromarray(np.arange(9600, dtype=np.uint16).reshape(96, 100)), "PNG"),
        "clear.png": encoded(scene(32).convert("P"), "PNG", transparency=0),
        "moving.gif": encoded(scene(33), "GIF", save_all=True, append_images=[scene(34), scene(35)]),
        "broken.tif": without_second_size(encoded(scene(36), "TIFF", save_all=True, append_images=[scene(37)])),
    }
    for name, content in faults.items():
        (folder / name).write_bytes(content)
    result = checked(command, data, tmp_path)

    def named(kind, key="reason"):
        return {image["path"].removeprefix("train/a/"): image[key] for image in result[kind]}

    unreadable = {"empty.jpg": "empty", "truncated.jpg": "truncated", "text.jpg": "not an image"}
    assert named("unreadable", "kind") == unreadable
    assert named("tiny") == {"tiny.png": "7×9 pixels"}
    assert named("huge") == {"huge.png": "961×40 pixels"}
    assert named("odd_colour") == {"cmyk.jpg": "CMYK", "deep.png": "16 bits", "clear.png": "palette with transparency"}
    assert named("animated") == {
        "moving.gif": "3 frames, of which the first is used",
        "broken.tif": "damaged behind the first frame, which is used (Missing dimensions)",
    }
    assert set(quarantined(tmp_path)) == {f"train/a/{name}" for name in unreadable}


def test_sixteen_bit_colour_is_seen_although_it_opens_as_8_bits(tmp_path):
    import zlib

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"".join(b"\0" + bytes(5 * 6) for _ in range(3))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 3, 16, 2, 0, 0, 0))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "deep.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    (image,) = inspect_images(open_dataset(tmp_path), 1000, {0}, lambda *_: None)
    assert (image.colour, image.height, image.width) == ("16 bits", 3, 5)


def test_copies_between_splits_are_found_and_the_held_out_one_is_kept(command, data, tmp_path):
    original = data / "val" / "b" / "17.jpg"
    (data / "train" / "b" / "same.jpg").write_bytes(original.read_bytes())
    (data / "train" / "b" / "same pixels.png").write_bytes(encoded(Image.open(original), "PNG"))
    near = {
        "encoded.jpg": encoded(scene(19), quality=30),
        "smaller.jpg": encoded(scene(21).resize((70, 50))),
        "cropped.jpg": encoded(scene(23).crop((9, 7, 120, 96))),
    }
    for name, content in near.items():
        (data / "train" / "b" / name).write_bytes(content)
    result = checked(command, data, tmp_path)
    (group,) = result["exact_duplicates"]
    assert group["between_splits"]
    assert not group["labels_differ"]
    assert {image["path"] for image in group["images"]} == {
        "val/b/17.jpg",
        "train/b/same.jpg",
        "train/b/same pixels.png",
    }
    pairs = {tuple(sorted(image["path"] for image in pair["images"])) for pair in result["near_duplicates"]}
    assert pairs == {
        ("train/b/encoded.jpg", "val/b/19.jpg"),
        ("train/b/smaller.jpg", "val/b/21.jpg"),
        ("train/b/cropped.jpg", "val/b/23.jpg"),
    }
    assert quarantined(tmp_path) == {
        "train/b/same.jpg": "exact duplicate of val/b/17.jpg",
        "train/b/same pixels.png": "exact duplicate of val/b/17.jpg",
        "train/b/encoded.jpg": "near duplicate of val/b/19.jpg",
        "train/b/smaller.jpg": "near duplicate of val/b/21.jpg",
        "train/b/cropped.jpg": "near duplicate of val/b/23.jpg",
    }


def test_a_picture_with_two_labels_is_quarantined_whole(command, data, tmp_path):
    (data / "train" / "a" / "again.jpg").write_bytes((data / "train" / "b" / "3.jpg").read_bytes())
    (group,) = checked(command, data, tmp_path)["exact_duplicates"]
    assert group["labels_differ"]
    assert not group["between_splits"]
    assert quarantined(tmp_path) == {
        "train/a/again.jpg": "duplicate of train/b/3.jpg, which has the label b",
        "train/b/3.jpg": "duplicate of train/a/again.jpg, which has the label a",
    }


def test_a_near_copy_under_another_label_is_quarantined_within_a_split_too(command, data, tmp_path):
    (data / "train" / "a" / "again.jpg").write_bytes(encoded(scene(3), quality=40))
    (data / "train" / "b" / "same label.jpg").write_bytes(encoded(scene(5), quality=40))
    assert len(checked(command, data, tmp_path)["near_duplicates"]) == 2
    assert quarantined(tmp_path) == {
        "train/a/again.jpg": "duplicate of train/b/3.jpg, which has the label b",
        "train/b/3.jpg": "duplicate of train/a/again.jpg, which has the label a",
    }


TINY_RUN = ("--model", "resnet_micro", "--img-size", 16, "--epochs", 1)


def test_the_command_that_check_prints_trains(command, data, tmp_path, monkeypatch):
    """And evaluate leaves out the same images, whatever has become of the list since."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        (data / split / "a" / "empty.jpg").write_bytes(b"")
    output = command("check", data)[1]
    assert {*describe(open_dataset(data))} <= {*output.splitlines()}
    (printed,) = (line for line in output.splitlines() if "better be left out" in line)
    count, words = printed.split("; ")
    assert count == "2 images had better be left out"
    assert "add --pretrained hub to that: " in output
    page = " ".join((tmp_path / "check-photos" / "check.html").read_text().split())
    assert "as training from random weights has it: " in page
    assert "shows theirs. Images that keep less than" in page
    status, output, errors = command(*shlex.split(words)[1:], *TINY_RUN)
    assert status == 0, errors
    assert "2 images excluded" in output
    assert "very pixels" not in output
    listed = str(tmp_path / "check-photos" / "quarantine.csv")
    assert {*describe(open_dataset(data, listed))} <= {*output.splitlines()}
    assert "16 training and 8 held-out images" in output
    run = tmp_path / "runs" / "photos"
    assert not (run / "skipped.csv").exists()
    (tmp_path / "check-photos" / "quarantine.csv").unlink()
    assert json.loads(command("evaluate", run, "--json")[1])["skipped"] == 0


def test_train_names_held_out_images_that_it_is_trained_on_too(command, data, tmp_path):
    shutil.copy(data / "train" / "b" / "3.jpg", data / "val" / "b" / "copy.jpg")
    status, output, errors = command("train", data, *TINY_RUN, "--out", tmp_path / "run")
    assert status == 0, errors
    assert "warning: 1 held-out image with the very pixels of a training image, which flatters" in output
    assert "the result: 'val/b/copy.jpg'; `tokenfusion check` finds these" in output


def class_of_a_damaged_image(data):
    (data / "train" / "c").mkdir()
    (data / "train" / "c" / "damaged.jpg").write_bytes(encoded(scene(50))[:300])
    return "class 'c' has 0 training images"


def class_of_a_copy_with_two_labels(data):
    (data / "train" / "c").mkdir()
    (data / "train" / "c" / "3.jpg").write_bytes((data / "train" / "b" / "3.jpg").read_bytes())
    return "class 'c' has 0 training images"


def held_out_images_all_damaged(data):
    for path in (data / "val").rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:300])
    return "it names every image of val"


@pytest.mark.parametrize(
    "harm", [class_of_a_damaged_image, class_of_a_copy_with_two_labels, held_out_images_all_damaged]
)
def test_no_command_is_printed_that_train_would_refuse(command, data, tmp_path, harm):
    said, found = harm(data), tmp_path / "found"
    status, output, _ = command("check", data, "--out", found)
    assert status == 0
    assert "tokenfusion train" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("to be mended first"))
    assert said in line
    assert said in json.loads((found / "check.json").read_text())["train_refuses"]
    assert said.replace("'", "&#39;") in (found / "check.html").read_text()
    status, _, errors = command("train", data, *TINY_RUN, "--exclude", found / "quarantine.csv", "--out", found / "run")
    assert status == 2
    assert said in errors


def test_a_run_has_its_own_copy_of_the_list(data, tmp_path):
    """Resumed and evaluated without the list that was given, or with another of that name; one killed before it had a
    copy makes it."""
    given, run = tmp_path / "list.csv", tmp_path / "run"
    content = "path,reason\nval/a/16.jpg,blurred\n"
    given.write_text(content)
    changes = {"model": "resnet_micro", "epochs": 1, "img_size": (16, 16), "batch_size": 8}
    start(small_recipe(data=str(data), exclude=str(given), **changes), run, Console(quiet=True))
    for lost, now in (
        ([], "path\nval/a/18.jpg\nval/b/17.jpg\n"),
        ([], None),
        (["excluded.csv"], content),
    ):
        for name in ("model.safetensors", *lost):
            (run / name).unlink()
        given.write_text(now) if now else given.unlink()
        resume(run, Console(quiet=True))
        assert (run / "excluded.csv").read_text() == content
    given.unlink()
    assert evaluate(run)["n"] == 7


def test_the_folder_of_the_printed_command_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert free_run("a b.tar") == Path("runs/a-b")
    for name in ("a-b", "a-b-2"):
        Path("runs", name).mkdir(parents=True)
    assert free_run("a b.tar") == Path("runs/a-b-3")


def test_a_list_that_can_be_read_once_only_is_kept_whole(data, tmp_path):
    """As from the shell's <(grep ...)."""
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=pipe.write_text, args=("path\nval/a/16.jpg\n",))
    writer.start()
    keep_list(tmp_path, str(pipe))
    writer.join()
    assert open_dataset(data, str(pipe), tmp_path).splits == ["train"] * 16 + ["val"] * 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,reason\nelsewhere/1.jpg,bad\n", "nothing that it names (1 path) is in"),
        ("file\n1.jpg\n", "it must name a column path"),
        (None, "list.csv: no such file"),
    ],
)
def test_a_list_of_other_data_is_refused(command, data, tmp_path, content, message):
    if content:
        (tmp_path / "list.csv").write_text(content)
    status, _, errors = command("train", data, "--out", tmp_path / "run", "--exclude", tmp_path / "list.csv")
    assert status == 2
    assert message in errors


def test_a_list_that_names_all_held_out_images_is_refused(data, tmp_path):
    names = [name for name in open_dataset(data).names if name.startswith("val/")]
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(names) + "\n")
    with pytest.raises(InputError, match=r"list\.csv: it names every image of val in .*photos; take some out"):
        open_dataset(data, str(tmp_path / "list.csv"))
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(names[1:]) + "\n")
    assert open_dataset(data, str(tmp_path / "list.csv")).splits == ["train"] * 16 + ["val"]


def test_paths_that_are_gone_are_counted(data, tmp_path):
    (tmp_path / "list.csv").write_text("path,reason\ntrain/a/0.jpg,\ntrain/a/gone.jpg,\n")
    source = open_dataset(data, str(tmp_path / "list.csv"))
    assert source.excluded == "1 image excluded; not in the data: 1 path of the list"
    whole = open_dataset(data)
    assert source.names == [name for name in whole.names if name != "train/a/0.jpg"]
    assert source.labels.tolist() == whole.labels[[name != "train/a/0.jpg" for name in whole.names]].tolist()
    assert torch.equal(source.decode(5, 10**6), whole.decode(6, 10**6))


def test_the_report_never_lies_inside_the_data(command, data):
    status, _, errors = command("check", data, "--out", data / "found")
    assert status == 2
    assert "lies inside the images" in errors
    assert not (data / "found").exists()


def test_data_that_cannot_be_opened_leaves_no_folder(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("check", "fotos")[0] == 2
    assert not list(tmp_path.iterdir())


def test_only_what_is_compared_is_kept(command, data, tmp_path, monkeypatch):
    images = inspect_images(open_dataset(data), 10**6, {1, 5}, lambda *_: None)
    assert [index for index, image in enumerate(images) if image.thumbnail.numel()] == [1, 5]
    monkeypatch.setattr("tokenfusion.check.checkup.MAX_IMAGES", 23)
    monkeypatch.setattr("tokenfusion.check.labels.MAX_JUDGED", 20)
    result = checked(command, data, tmp_path)
    assert result["near_duplicates_searched"]["searched"] == 0
    assert result["labels"]["judged"] == 20


def test_the_judged_images_are_an_even_sample_of_the_classes_that_are_large_enough(monkeypatch):
    labels = np.repeat([0, 1, 2], [12, 9, 15])
    assert choose_judged(labels).tolist() == [*range(12), *range(21, 36)]
    monkeypatch.setattr("tokenfusion.check.labels.MAX_JUDGED", 3)
    assert choose_judged(labels).tolist() == [0, 22, 35]
    assert choose_judged(np.ones((20, 2), dtype=bool)).tolist() == []


def test_the_page_is_one_file_with_pictures(command, data, tmp_path):
    (data / "train" / "a" / "<b>.jpg").write_bytes((data / "val" / "a" / "16.jpg").read_bytes())
    assert command("check", data, "--out", tmp_path / "found")[0] == 0
    page = (tmp_path / "found" / "check.html").read_text()
    assert "between splits" in page
    assert "&lt;b&gt;.jpg" in page
    assert "<b>.jpg" not in page
    assert page.count("data:image/jpeg") == 2
    assert "http" not in page.replace("http-equiv", "")


def test_the_page_shows_some_of_every_readable_kind(command, data, tmp_path):
    """Of an image of any shape, and as many as are worth a look."""
    folder = data / "train" / "a"
    for shade in range(14):
        (folder / f"tiny {shade}.png").write_bytes(encoded(Image.new("RGB", (5, 3 + shade)), "PNG"))
    (folder / "huge.png").write_bytes(encoded(Image.new("RGB", (3000, 40)), "PNG"))
    (folder / "moving.gif").write_bytes(encoded(scene(33), "GIF", save_all=True, append_images=[scene(34)]))
    (folder / "cmyk.jpg").write_bytes(encoded(scene(31).convert("CMYK")))
    output = command("check", data, "--out", tmp_path / "found")[1]
    page = (tmp_path / "found" / "check.html").read_text()
    section = page[page.index('<section id="images">') :]
    pictures = [part.count("data:image/jpeg") for part in section.split("<h3>")[1:]]
    assert pictures == [12, 1, 1, 1]
    (cut,) = re.findall(r'<section id="crop">.*?base64,([^"]*)', page, re.DOTALL)
    with Image.open(io.BytesIO(base64.b64decode(cut))) as picture:
        assert picture.size == (320, 4)
    assert not re.search(r"\b1 (images|classes|labels)\b", page + output)


@pytest.mark.parametrize(("height", "width", "shrunk"), [(40, 3000, (1, 50)), (300, 200, (50, 33)), (7, 9, (7, 9))])
def test_no_side_of_a_picture_is_longer_than_asked_and_none_vanishes(height, width, shrunk):
    assert shrink(torch.zeros(3, height, width, dtype=torch.uint8), 50).shape[1:] == shrunk


def test_small_images_take_no_part_in_the_search_for_near_duplicates(command, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenfusion.check.labels.MAX_JUDGED", 100)
    assert command("check", "digits", "--out", tmp_path / "found")[0] == 0
    result = json.loads((tmp_path / "found" / "check.json").read_text())
    assert result["near_duplicates"] == []
    assert result["near_duplicates_searched"] == {"searched": 0, "too_small": 1797, "too_plain": 0}


def test_plain_images_are_no_near_duplicates():
    images = [
        Inspection("", 64, 64, "", "", bytes([shade]), torch.full((3, 48, 48), shade, dtype=torch.uint8))
        for shade in range(5)
    ]
    found = near_duplicates(images, lambda *_: None)
    assert (found.pairs, found.too_plain) == ([], 5)


@pytest.mark.parametrize(("side", "of_sky"), [(200, 2), (32, 3)])
def test_a_photograph_without_a_tenth_at_each_of_three_sides_is_found_again(side, of_sky):
    photographs = load_sample_images().images
    pieces = [photo[y : y + 200, x : x + 200] for photo in photographs for y in (0, 110, 220) for x in (0, 200, 400)]
    images = []
    for piece in pieces:
        small = np.asarray(Image.fromarray(piece).resize((side, side)))
        for part in (small, small[side // 10 : side - side // 10, : side - side // 10]):
            shown = Image.open(io.BytesIO(encoded(Image.fromarray(part))))
            thumbnail = F.resize(F.pil_to_tensor(shown), [48, 48], antialias=True)
            images.append(Inspection("", *part.shape[:2], "", "", bytes([len(images)]), thumbnail))
    found = near_duplicates(images, lambda *_: None)
    assert len(found.pairs) == len(pieces) - of_sky
    assert all(pair.second == pair.first + 1 and pair.first % 2 == 0 for pair in found.pairs)


def test_exact_duplicates_are_of_the_same_shape():
    assert exact_duplicates(
        [Inspection(digest=b"x"), Inspection(digest=b""), Inspection(digest=b"x"), Inspection(digest=b"")]
    ) == [[0, 2]]


def test_groups_are_what_pairs_connect():
    assert connected(7, [(0, 3), (5, 3), (1, 6)]) == [[0, 3, 5], [1, 6]]


def test_what_the_crop_keeps_is_what_cover_keeps():
    image = torch.arange(300.0).expand(3, 100, 300)
    seen = cover(image, (50, 50), 0.8)
    height, width = kept(100, 300, (50, 50), 0.8)
    assert (height, width) == pytest.approx((0.8, 0.8 / 3))
    assert float(seen.max() - seen.min()) == pytest.approx(300 * width, abs=3)


def test_a_flipped_label_of_an_easy_class_is_disputed():
    thumbnails = torch.zeros(60, 3, 48, 48, dtype=torch.uint8)
    thumbnails[::2, 0] = 220
    thumbnails[1::2, 2] = 220
    thumbnails += torch.randint(0, 30, thumbnails.shape, generator=torch.manual_seed(0)).to(torch.uint8)
    labels = np.arange(60) % 2
    labels[13] = 0
    judgement = judge_labels([thumbnail_features(thumbnails)], labels, np.arange(100, 160), None, 0.003)
    assert [(d.image, d.suggestion) for d in judgement.disputes] == [(113, 1)]


def test_what_is_said_of_classes():
    labels = np.repeat([0, 1, 2, 0, 1], [400, 400, 5, 100, 20])
    splits = ["train"] * 805 + ["val"] * 120
    notes = {row["name"]: row["notes"] for row in count_classes(("a", "b", "c", "d"), labels, splits)}
    assert notes["a"] == ["is 49.7% of train and 83.3% of val"]
    assert notes["b"] == ["is 49.7% of train and 16.7% of val"]
    assert notes["c"] == ["is rare: 5 images, where the median class has 212.5", "has no image in val"]
    assert notes["d"] == ["has no image"]
