"""JPEGs with wrong bytes amid their data: libjpeg decodes them all the same, and what it says does not vanish."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from making import add
from PIL import ExifTags, Image

from runs import TINY
from tokenfusion.classifier import Classifier
from tokenfusion.data.decode import Hearing, damage_of, decode_ahead, decode_image, decode_plain
from tokenfusion.predict.many import MANIFEST
from tokenfusion_runtime.decoding import PRINTED, decoding, printed, printed_after

LIMIT = 10**6


def jpeg(seed: int, mode: str = "RGB", damaged: bool = False, turned: bool = False) -> bytes:
    """A picture of 96×128; damaged ones have two hundred bytes of their data twice."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6 if turned else 1
    file = io.BytesIO()
    Image.fromarray(coarse).resize((128, 96), Image.Resampling.BICUBIC).convert(mode).save(file, "JPEG", exif=exif)
    data = bytearray(file.getvalue())
    if damaged:
        start = data.rfind(b"\xff\xda")
        place = start + (len(data) - start) // 2
        data[place:place] = data[place - 200 : place]
    return bytes(data)


def photos(folder: Path, turned: bool = False, mode: str = "RGB") -> list[str]:
    """Twelve images of two classes, of which three are damaged; the names of these."""
    for number in range(12):
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, mode, damaged=number in (3, 4, 8), turned=turned))
    return ["a/4.jpg", "a/8.jpg", "b/3.jpg"]


@pytest.mark.parametrize(("mode", "turned"), [("RGB", False), ("L", False), ("RGB", True), ("CMYK", False)])
def test_check_lists_them_with_what_libjpeg_says(command, tmp_path: Path, mode: str, turned: bool) -> None:
    names = photos(tmp_path / "x", turned, mode)
    status, output, errors = command("check", tmp_path / "x", "--out", tmp_path / "found")
    assert (status, errors) == (0, "")
    assert "0 unreadable, 3 damaged, " in output
    found = json.loads((tmp_path / "found" / "check.json").read_text())
    assert [image["path"] for image in found["damaged"]] == names
    assert all("bytes before marker" in image["reason"] for image in found["damaged"])
    assert found["quarantined"] == 0
    assert "Damaged" in (tmp_path / "found" / "check.html").read_text()


def test_training_evaluate_and_predict_count_them(command, tmp_path: Path) -> None:
    names, run = photos(tmp_path / "x"), tmp_path / "run"
    words = ("--model", TINY, "--img-size", 8, "--batch-size", 8, "--epochs", 1, "--val-fraction", 0.5, "--out", run)
    status, output, errors = command("train", tmp_path / "x", *words)
    assert (status, errors) == (0, "")
    assert "3 JPEGs have damaged data, read as far as it goes, such as " in output
    status, output, _ = command("evaluate", run)
    held_out = {line.split(",")[0] for line in (run / "predictions.csv").read_text().splitlines()}
    expected = [name for name in names if name in held_out]
    assert [image["path"] for image in json.loads((run / "evaluation.json").read_text())["damaged"]] == expected
    assert expected
    assert f"{len(expected)} JPEG" in output
    status, output, errors = command("predict", run, tmp_path / "x", "--json")
    assert status == 0
    assert len(output.splitlines()) == 12
    assert f"3 JPEGs have damaged data, read as far as it goes, such as '{tmp_path}/x/a/4.jpg' (" in errors


def shards(folder: Path) -> list[str]:
    """The same pictures in two shards, eight to train on; the names of the damaged ones there."""
    folder.mkdir()
    for name, numbers in (("train-0.tar", range(8)), ("val-0.tar", range(8, 12))):
        with tarfile.open(folder / name, "w") as tar:
            for number in numbers:
                add(tar, f"{number}.jpg", jpeg(number, damaged=number in (3, 4, 8)))
                add(tar, f"{number}.cls", str(number % 2).encode())
    return ["train-0.tar/3.jpg", "train-0.tar/4.jpg", "val-0.tar/8.jpg"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENFUSION_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    Classifier.create(TINY, ("a", "b"), img_size=(8, 8), precision="fp32").save(folder)
    return folder


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("workers", [1, 3])
def test_predict_into_a_folder_counts_and_names_them(
    command, untrained: Path, tmp_path: Path, kind: str, workers: int
) -> None:
    names = photos(tmp_path / "x") if kind == "folder" else shards(tmp_path / "x")
    status, output, errors = command(
        "predict", untrained, tmp_path / "x", "--out", tmp_path / "out", "--workers", workers
    )
    assert (status, errors) == (0, "")
    assert output.startswith("12 images, 3 with damaged data read as far as it goes (column damage), in ")
    rows = [row for path in (tmp_path / "out").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    said = {row["path"].removeprefix(f"{tmp_path}/x/"): row["damage"] for row in rows if row["damage"]}
    assert sorted(said) == names
    assert all("bytes before marker" in words for words in said.values())
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["damaged"] == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_shards_counts_those_that_it_drew(command, tmp_path: Path, workers: int) -> None:
    shards(tmp_path / "x")
    words = ("--model", TINY, "--img-size", 8, "--batch-size", 4, "--epochs", 2, "--workers", workers)
    status, output, errors = command("train", tmp_path / "x", *words, "--out", tmp_path / "run")
    assert (status, errors) == (0, "")
    held_out, drawn = (line for line in output.splitlines() if "damaged data, read as far as it goes, such as" in line)
    assert held_out.startswith("1 JPEG has damaged data, read as far as it goes, such as 'val-0.tar/8.jpg' (")
    assert drawn.startswith("2 JPEGs have damaged data, read as far as it goes, such as 'train-0.tar/")


def test_each_is_told_from_others_that_are_decoded_meanwhile() -> None:
    files = [jpeg(number, damaged=number % 10 == 3) for number in range(40)]
    told: dict[int, str] = {}
    images = decode_ahead(
        range(40), lambda number: decode_image(files[number], max_pixels=LIMIT), on_damage=told.__setitem__
    )
    assert [number for number, _ in images] == list(range(40))
    assert sorted(told) == [3, 13, 23, 33]


def test_words_that_are_forgotten_meanwhile_are_asked_for_again() -> None:
    data = jpeg(0, damaged=True)
    with decoding():
        for _ in range(len(PRINTED) // 2 // 40):
            decode_plain(data)
    start = printed()
    with decoding():
        assert printed_after(start - 1) is None  # there was made room
        decode_plain(data)
        assert "before marker" in (printed_after(start) or "")
    assert "before marker" in Hearing().hear(lambda: decode_image(data, max_pixels=LIMIT))[1]


def test_a_jpeg_that_lacks_its_end_marker_alone_is_not_damaged() -> None:
    data = jpeg(0)
    assert damage_of(lambda: decode_image(data[:-2], max_pixels=LIMIT)) == ""
    assert damage_of(lambda: decode_image(data[: len(data) // 2], max_pixels=LIMIT)) == ""  # which is refused


def test_what_is_printed_fills_no_memory_and_is_counted_on() -> None:
    data, before = jpeg(0, damaged=True), printed()
    for _ in range(2 * len(PRINTED) // 50):
        with decoding():
            decode_plain(data)
    assert printed() - before > len(PRINTED)
    assert "before marker" in damage_of(lambda: decode_image(data, max_pixels=LIMIT))
    with decoding():  # more than there is room for, for nobody leaves meanwhile
        for _ in range(2 * len(PRINTED) // 50):
            decode_plain(data)
    assert "before marker" in damage_of(lambda: decode_image(data, max_pixels=LIMIT))


def test_a_child_of_fork_hears_for_itself() -> None:
    data = jpeg(0, damaged=True)
    child = os.fork()
    if child == 0:
        os._exit(0 if "before marker" in damage_of(lambda: decode_image(data, max_pixels=LIMIT)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert "before marker" in damage_of(lambda: decode_image(data, max_pixels=LIMIT))
