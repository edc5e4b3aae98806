"""Images of more than 8 bits: one range of values for all of a data set, found or given, and kept with the run."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from making import LIMIT, add, write_parquet
from PIL import Image

from runs import TINY
from tokenfusion.classifier import Classifier
from tokenfusion.data.decode import UnreadableImage, decode_image
from tokenfusion.data.open import open_dataset
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.data.value_range import LENGTH, STRETCHES, sample, with_value_range
from tokenfusion.errors import InputError
from tokenfusion.export.artefact import describe
from tokenfusion_runtime.classifier import ExportedClassifier
from tokenfusion_runtime.image import pillow_image

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))
KINDS: dict[str, tuple[np.ndarray, tuple[float, float]]] = {
    "12 bits in 16": ((RAMP * 4095).astype("u2"), (0, 4095)),
    "10 bits that are not reached": ((RAMP * 900).astype("u2"), (0, 1023)),
    "integers of 32 bits": ((RAMP * 100_000).astype("i4"), (0, 131_071)),
    "integers below zero": ((RAMP * 1400 - 1000).astype("i4"), (-1000, 400)),
    "floats": ((RAMP * 1000).astype("f4"), (0, 1000)),
    "small floats": ((RAMP / 64).astype("f4"), (0, 1 / 64)),
}


def tiff(values: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF", **options)
    return file.getvalue()


def deep_folder(folder: Path, values: np.ndarray, count: int = 6) -> Path:
    """Two classes, dark and light halves of a picture's values, each a little different."""
    for name, part in (("dark", values[:, :32]), ("light", values[:, 32:])):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(np.roll(part, number, axis=1)).save(folder / name / f"{number}.tif")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_is_found_and_spans_black_to_white(kind: str, tmp_path: Path) -> None:
    values, expected = KINDS[kind]
    source = open_dataset(deep_folder(tmp_path / "x", values))
    source, line = with_value_range(source, np.arange(len(source)), (), LIMIT)
    assert source.value_range == expected
    assert line.startswith(
        f"value range: {expected[0]:.9g} to {expected[1]:.9g}, found in 12 of the 12 training images"
    )
    shown = np.concatenate([source.decode(index, LIMIT)[0].numpy() for index in (0, 6)], axis=1)
    low, high = expected
    assert np.abs(shown - 255 * (values.astype(float) - low) / (high - low)).max() <= 0.51


def test_images_of_a_single_huge_value_have_a_range(tmp_path: Path) -> None:
    source = open_dataset(deep_folder(tmp_path / "x", np.full((8, 64), 1e20, np.float32)))
    source, _ = with_value_range(source, np.arange(len(source)), (), LIMIT)
    assert source.value_range is not None
    low, high = source.value_range
    assert low < high


def test_a_range_that_few_images_stretch_is_warned_of(tmp_path: Path) -> None:
    folder = deep_folder(tmp_path / "x", (RAMP * 3000).astype("u2"))
    source = open_dataset(folder)
    assert "warning" not in with_value_range(source, np.arange(len(source)), (), LIMIT)[1]
    Image.fromarray(np.full((48, 32), 65535, "u2")).save(folder / "dark" / "2.tif")
    line = with_value_range(source, np.arange(len(source)), (), LIMIT)[1]
    assert "warning: 1 of these images have values far from the others'" in line
    assert "such as 'dark/2.tif' with 65535 to 65535" in line


@pytest.mark.parametrize("value", [3e38, -3e38, 1e6])
def test_an_image_that_would_leave_the_others_nothing_makes_no_part_of_the_range(value, command, tmp_path) -> None:
    folder = deep_folder(tmp_path / "x", (RAMP * 1000).astype("f4"))
    source = open_dataset(folder)
    plain, _ = with_value_range(source, np.arange(len(source)), (), LIMIT)
    Image.fromarray(np.full((48, 32), value, "f4")).save(folder / "dark" / "2.tif")
    ranged, line = with_value_range(source, np.arange(len(source)), (), LIMIT)
    assert ranged.value_range == plain.value_range == (0, 1000)
    assert "warning: 1 of these images has values so far from all others' that they make no part of the range" in line
    assert f"such as 'dark/2.tif' with {np.float32(value):.9g} to {np.float32(value):.9g}" in line
    assert command("check", folder, "--out", tmp_path / "found")[0] == 0
    found = json.loads((tmp_path / "found" / "check.json").read_text())
    assert found["exact_duplicates"] == []
    assert [image["path"] for image in found["unreadable"]] == ["dark/2.tif"]


@pytest.mark.parametrize("value", [-3.4028234e38, -9.9e4, 3e38])
def test_values_that_stand_for_none_make_no_part_of_the_range(value: float, tmp_path: Path) -> None:
    values = (RAMP * 1000).astype("f4")
    values[:9] = value  # in every image, as where a map ends
    source = open_dataset(deep_folder(tmp_path / "x", values))
    source, line = with_value_range(source, np.arange(len(source)), (), LIMIT)
    assert source.value_range == (0, 1000)
    assert f"make no part of it, such as {np.float32(value):.9g} in 'dark/0.tif'" in line
    assert source.decode(0, LIMIT)[0, 0].unique().tolist() == [255 * (value > 0)]


@pytest.mark.parametrize("kind", ["a value for none that is not far enough to be told", "levels of their own"])
def test_a_range_of_which_most_images_use_little_is_warned_of(kind: str, tmp_path: Path) -> None:
    values = (RAMP * 800).astype("f4")
    if "none" in kind:
        values[:9] = -9999
    folder = deep_folder(tmp_path / "x", values)
    for number, path in enumerate(sorted(folder.glob("*/*.tif")) if "levels" in kind else []):
        Image.fromarray((RAMP[:, :32] * 40 + 1000 * number).astype("f4")).save(path)
    source = open_dataset(folder)
    line = with_value_range(source, np.arange(len(source)), (), LIMIT)[1]
    assert "warning: most values of most images lie within 32 of 256 shades of gray, as those of " in line


def test_what_is_no_number_is_black_and_broken_pixels_decide_nothing(tmp_path: Path) -> None:
    values = np.tile((RAMP * 1000).astype("f4"), (4, 4))
    values[0, :3] = np.nan, np.inf, 1e9
    source = open_dataset(deep_folder(tmp_path / "x", np.tile(values, (1, 2))[:, : values.shape[1] // 4]))
    source, _ = with_value_range(source, np.arange(len(source)), (), 10**6)
    assert source.value_range == pytest.approx((0, 1000))
    assert source.value_range is not None
    shown = decode_image(tiff(values), max_pixels=10**6, value_range=source.value_range)
    assert shown[:, 0, :3].tolist() == [[0, 255, 255]] * 3
    with pytest.raises(UnreadableImage, match="none of its values is a finite number"):
        decode_image(tiff(np.full((4, 4), np.nan, "f4")), max_pixels=99, value_range=(0, 1))


def test_images_in_another_unit_are_refused_and_others_cut_off() -> None:
    values, low_high = (RAMP * 65535).astype("u2"), (0, 4095)
    with pytest.raises(UnreadableImage, match="its values, 0 to 65535, lie outside the value range 0 to 4095"):
        decode_image(tiff(values), max_pixels=LIMIT, value_range=low_high)
    with pytest.raises(UnreadableImage, match="lie outside"):
        decode_image(tiff(np.full((4, 4), -1000.0, "f4")), max_pixels=LIMIT, value_range=low_high)
    window = decode_image(tiff((RAMP * 5000).astype("u2")), max_pixels=LIMIT, value_range=low_high)
    assert (window[0, 0, 0], window[0, 0, -1]) == (0, 255)


def test_without_a_range_16_bits_are_as_before_and_floats_refused() -> None:
    values = (RAMP * 65535).astype("u2")
    assert np.array_equal(decode_image(tiff(values), max_pixels=LIMIT)[0].numpy(), values >> 8)
    with pytest.raises(UnreadableImage, match=r"no defined white; .* or train with --value-range LOW HIGH"):
        decode_image(tiff(RAMP.astype("f4")), max_pixels=LIMIT)


def test_a_deep_image_stands_upright() -> None:
    values = (RAMP * 4095).astype("u2")
    turned = decode_image(tiff(values, tiffinfo={274: 6}), max_pixels=LIMIT, value_range=(0, 4095))
    assert turned.shape == (3, 64, 48)
    assert (turned[0, 0, 0], turned[0, -1, 0]) == (0, 255)


def test_images_of_8_bits_have_no_range_and_stay_as_they_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray((RAMP * 255).astype("u1")).save(tmp_path / name / "1.png")
    source = open_dataset(tmp_path)
    assert with_value_range(source, np.arange(2), (), LIMIT) == (source, "")
    given, line = with_value_range(source, np.arange(2), (0.0, 9.0), LIMIT)
    assert line == "value range: 0 to 9 as given, though none of 2 images has more than 8 bits"
    assert np.array_equal(given.decode(0, LIMIT).numpy(), source.decode(0, LIMIT).numpy())
    Image.fromarray((RAMP * 4095).astype("u2")).save(tmp_path / "a" / "2.png")
    source = open_dataset(tmp_path)
    mixed, line = with_value_range(source, np.arange(3), (), LIMIT)
    assert "found in 1 of the 3 training images looked at" in line
    assert (mixed.decode(0, LIMIT).int() - mixed.decode(1, LIMIT).int()).abs().max() <= 1


def test_the_sample_is_bounded_and_spread() -> None:
    chosen = sample(np.arange(100_000))
    assert len(chosen) == STRETCHES * LENGTH
    assert (chosen[0], chosen[-1]) == (0, 99_999)
    assert sample(np.arange(7)) == list(range(7))
    assert sample(np.arange(1000), np.arange(1000) // 500) == list(range(STRETCHES * LENGTH))
    assert sample(np.arange(7, 1000), np.arange(1000) // 10) == [7, 8, 9]


@pytest.mark.parametrize("values", [(5.0,), (5.0, 5.0), (9.0, 1.0), (0.0, float("nan")), (0.0, float("inf")), (0, "9")])
def test_what_is_no_range_is_refused(values: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match="is no range; give its lowest and its highest value"):
        Preprocess((8, 8), 1, (0.5,), (0.5,), value_range=values)  # type: ignore[arg-type]


def test_a_preprocessing_without_a_range_is_written_as_it_always_was() -> None:
    plain = Preprocess((8, 8), 1, (0.5,), (0.5,))
    assert "value_range" not in plain.to_dict()
    assert Preprocess.from_dict(plain.to_dict()) == plain
    ranged = Preprocess((8, 8), 1, (0.5,), (0.5,), value_range=(0.0, 4095.0))
    assert Preprocess.from_dict(json.loads(json.dumps(ranged.to_dict()))) == ranged


def test_arrays_of_other_numbers_are_taken_by_a_model_with_a_range() -> None:
    values = (RAMP * 4095).astype("u2")
    assert np.array_equal(np.asarray(pillow_image(values, LIMIT, (0, 4095)))[0], np.rint(values[0] / 4095 * 255))
    with pytest.raises(InputError, match="type uint16 is not an image"):
        pillow_image(values, LIMIT)


def test_a_run_keeps_its_range_and_every_verb_goes_by_it(command, tmp_path) -> None:
    folder, run, values = tmp_path / "x", tmp_path / "run", (RAMP * 4095).astype("u2")
    deep_folder(folder, values, count=10)
    words = ("--model", TINY, "--img-size", 8, "--batch-size", 8, "--hflip", 0)
    status, output, errors = command("train", folder, *words, "--epochs", 1, "--out", run)
    assert (status, errors) == (0, "")
    assert "value range: 0 to 4095, found in 16 of the 16 training images" in output.replace("\n", " ")
    assert json.loads((run / "model.json").read_text())["preprocess"]["value_range"] == [0.0, 4095.0]
    scores = [command("evaluate", run, *data, "--json")[1] for data in ((), (folder,))]
    assert json.loads(scores[0])["skipped"] == json.loads(scores[1])["skipped"] == 0
    classifier = Classifier.load(run)
    same = [folder / "light" / "0.tif", (folder / "light" / "0.tif").read_bytes(), values[:, 32:]]
    same.append(Image.fromarray(values[:, 32:]))
    first, *others = classifier.predict(same)
    assert [other.labels for other in others] == [first.labels] * 3
    assert [other.error for other in (first, *others)] == [""] * 4
    Image.fromarray(values * 16).save(tmp_path / "brighter.tif")
    status, output, _ = command("predict", run, tmp_path / "brighter.tif", "--format", "json")
    assert status == 1
    assert "outside the value range 0 to 4095 of the training images" in json.loads(output)["error"]
    assert command("predict", run, folder, tmp_path / "brighter.tif", "--out", tmp_path / "many")[0] == 0
    rows = pq.read_table(next((tmp_path / "many").glob("*.parquet"))).to_pylist()
    assert [("outside the value range" in (row["error"] or "")) for row in rows] == [False] * 20 + [True]
    status, output, _ = command("check", folder, "--out", tmp_path / "check", "--value-range", 100, 4000)
    assert "value range: 100 to 4000 as given; 20 of 20 images looked at have values beyond it" in output
    found = json.loads((tmp_path / "check" / "check.json").read_text())
    assert found["value_range"] == [100.0, 4000.0]
    assert "of its values (0 to 2015) outside 100 to 4000" in found["odd_colour"][0]["reason"]


def test_a_given_range_goes_before_what_is_found_and_does_not_swallow_data(command, tmp_path) -> None:
    folder, run = deep_folder(tmp_path / "x", (RAMP * 1400 - 1000).astype("i4")), tmp_path / "run"
    words = ("--model", TINY, "--img-size", 8, "--batch-size", 8, "--epochs", 1, "--out", run)
    status, output, errors = command("train", "--value-range", -1200, 400, folder, *words)
    assert (status, errors) == (0, "")
    assert "value range: -1200 to 400 as given; 0 of 10 images" in output.replace("\n", " ")
    assert Classifier.load(run).preprocess.value_range == (-1200.0, 400.0)


def test_an_export_decodes_as_its_run(command, tmp_path) -> None:
    folder, run = deep_folder(tmp_path / "x", (RAMP * 1000).astype("f4")), tmp_path / "run"
    words = ("--model", TINY, "--img-size", 8, "--batch-size", 8, "--epochs", 1, "--out", run)
    assert command("train", folder, *words)[0] == 0
    image, classifier = folder / "light" / "3.tif", Classifier.load(run)
    exported = ExportedClassifier(describe(run, "onnx", "fp32", None), engine=lambda images: images)
    ours = classifier.prepare(image)[1]
    for given in (image, image.read_bytes(), np.asarray(Image.open(image)), Image.open(image)):
        theirs = exported.prepare(given)[1]
        assert np.abs(np.asarray(theirs).astype(int) - np.asarray(ours).astype(int)).max() <= 1
    assert np.asarray(ours).max() > 200
    assert "outside the value range 0 to 1000" in str(exported.prepare(tiff((RAMP * 9000).astype("f4")))[1])


@pytest.mark.parametrize("kind", ["shards", "parquet", "tar", "list"])
def test_a_range_is_found_wherever_the_images_lie(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENFUSION_CACHE", str(tmp_path / "cache"))
    values, names = (RAMP * 3000).astype("u2"), ("a", "b")
    files = [tiff(np.roll(values, number)) for number in range(4)]
    if kind == "parquet":
        write_parquet(tmp_path / "x" / "0.parquet", [*files], [0, 1, 0, 1], [*names])
    else:
        (tmp_path / "x").mkdir()
        with tarfile.open(tmp_path / "x" / "0.tar", "w") as tar:
            for number, data in enumerate(files):
                folder = "" if kind == "shards" else f"{names[number % 2]}/"
                add(tar, f"{folder}{number}.tif", data)
                if kind == "shards":
                    add(tar, f"{number}.cls", names[number % 2].encode())
    place = tmp_path / "x" / "0.tar" if kind == "tar" else tmp_path / "x"
    if kind == "list":
        with tarfile.open(tmp_path / "x" / "0.tar") as tar:
            tar.extractall(tmp_path / "y", filter="data")
        place = tmp_path / "y" / "x.csv"
        place.write_text("path,label\n" + "".join(f"{'ab'[n % 2]}/{n}.tif,{'ab'[n % 2]}\n" for n in range(4)))
    source = open_dataset(place)
    source, line = with_value_range(source, np.arange(4), (), LIMIT)
    assert source.value_range == (0, 4095)
    assert "found in 4 of the 4" in line
    assert source.decode(0, LIMIT)[0].max() == round(3000 / 4095 * 255)


def test_colour_of_which_nearly_nothing_is_left_is_warned_of(tmp_path: Path) -> None:
    for name, high in (("a", 4095), ("b", 65535)):
        rows = b"".join(b"\0" + np.full((8, 3), high, ">u2").tobytes() for _ in range(8))
        chunks = [
            (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        ]
        packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    source = open_dataset(tmp_path)
    assert with_value_range(source, np.array([0]), (), LIMIT)[1] == (
        "warning: colour images of 16 bits (1 looked at) are nearly black, for the high byte of each channel is read, "
        "and these end at 15 of 255; convert them to 8 bits"
    )
    assert with_value_range(source, np.arange(2), (), LIMIT) == (source, "")
