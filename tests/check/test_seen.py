"""The check-up by what pretrained parents see: timm's small test models on a folder of pictures."""

import errno
import json
import shlex
from itertools import product

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from runs import TINY_PARENTS
from tokenfusion import Recipe, features
from tokenfusion.training import start
from tokenfusion.training.model import build

CNN, VIT = TINY_PARENTS
MODEL = f"fuse({CNN},{VIT},probe,add)"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def colours(tmp_path):
    """Forty-two pictures of three colours, of which one has the label of another."""
    for label, name in enumerate(("red", "green", "blue")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(14):
            pixels = np.random.default_rng([label, number]).integers(0, 60, (36, 36, 3), dtype=np.uint8)
            pixels[..., label] += 180
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos" / "blue" / "3.png").rename(tmp_path / "photos" / "red" / "flipped.png")
    return tmp_path / "photos"


@pytest.fixture
def words(parent_files, tmp_path):
    return ("--model", MODEL, "--pretrained", *parent_files, "--img-size", 64, "--out", tmp_path / "check")


def test_labels_are_judged_by_what_training_then_takes_from_the_cache(
    parent_files, tmp_path, command, monkeypatch, colours, words
):
    """Whatever it leaves out and holds out."""
    (colours / "red" / "empty.png").write_bytes(b"")
    (colours / "green" / "copy.png").write_bytes((colours / "green" / "0.png").read_bytes())
    status, output, errors = command("check", colours, *words)
    assert status == 0, errors
    (printed,) = (line for line in output.splitlines() if "better be left out" in line)
    assert shlex.join(map(str, (colours, *words[:-4], "--exclude"))) in printed  # training begins with the same weights
    assert "add --pretrained" not in output
    assert f"loading the weights of {CNN} and {VIT}" in errors
    found = json.loads((tmp_path / "check" / "check.json").read_text())
    judged = found["labels"]
    assert [file["model"] for file in judged["judged_by"]] == [CNN, VIT]
    assert judged["judged"] == 43
    assert judged["model_accuracy"] > 0.8
    assert ("red/flipped.png", "blue") in [(row["path"], row["suggestion"]) for row in judged["disputes"]]
    assert found["seconds"] >= found["feature_seconds"] > 0
    trained = build(Recipe(model=MODEL, pretrained=parent_files, img_size=64), ["a"]).preprocess
    assert (found["crop"]["by"], found["crop"]["crop_pct"]) == ("the pretrained weights", trained.crop_pct)
    assert trained.crop_pct != Recipe().crop_pct
    assert "what two pretrained parents see" in (tmp_path / "check" / "check.html").read_text()
    monkeypatch.setattr("tokenfusion.features.append_rows", None)  # nothing is left to be looked at
    for number, (exclude, seed) in enumerate(product(("", str(tmp_path / "check" / "quarantine.csv")), (0, 1))):
        recipe = Recipe(
            str(colours), model=MODEL, pretrained=parent_files, img_size=64, tune="probe", exclude=exclude, seed=seed
        )
        start(recipe, tmp_path / f"run-{number}", Console(quiet=True))


def test_deep_images_are_seen_as_training_sees_them(parent_files, tmp_path, command, monkeypatch, words):
    for label, name in enumerate("ab"):
        (tmp_path / "deep" / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.random.default_rng([label, number]).integers(0, 3000, (36, 36), dtype=np.uint16)
            Image.fromarray(pixels + np.uint16(1000 * label)).save(tmp_path / "deep" / name / f"{number}.png")
    assert command("check", tmp_path / "deep", *words, "--value-range", 0, 4000)[0] == 0
    monkeypatch.setattr("tokenfusion.features.append_rows", None)
    recipe = Recipe(
        str(tmp_path / "deep"),
        model=MODEL,
        pretrained=parent_files,
        img_size=64,
        tune="probe",
        value_range=(0.0, 4000.0),
    )
    start(recipe, tmp_path / "run", Console(quiet=True))


def test_a_second_check_up_looks_at_nothing_anew(command, monkeypatch, colours, words):
    first = json.loads(command("check", colours, *words, "--json")[1])
    (colours / "red" / "flipped.png").rename(colours / "blue" / "3.png")  # a label mended, and another order
    monkeypatch.setattr("tokenfusion.features.append_rows", None)
    second = json.loads(command("check", colours, *words, "--json")[1])
    assert second["labels"]["wrong_share"] < first["labels"]["wrong_share"]


def test_a_full_disk_leaves_no_folder_and_is_gone_on_with(command, monkeypatch, colours, words, tmp_path):
    monkeypatch.setattr(features, "BLOCK", 16)
    write, noted = features.write_json, []

    def full(path, value):
        if len(value) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        noted.append(len(value))
        write(path, value)

    monkeypatch.setattr(features, "write_json", full)
    status, _, errors = command("check", colours, *words)
    assert status == 2
    assert "No space left on device; what there is of it is gone on with: make room" in errors
    assert not (tmp_path / "check").exists()
    monkeypatch.setattr(features, "write_json", lambda path, value: (noted.append(len(value)), write(path, value)))
    assert command("check", colours, *words)[0] == 0
    assert noted == [1, 2, 3]  # the first block was safe


def test_gray_images_smaller_than_a_patch_are_judged(command, tmp_path, words):
    for label, name in enumerate("ab"):
        (tmp_path / "tiny" / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.random.default_rng([label, number]).integers(0, 60, (5, 7), dtype=np.uint8)
            Image.fromarray(pixels + np.uint8(150 * label)).save(tmp_path / "tiny" / name / f"{number}.png")
    status, output, errors = command("check", tmp_path / "tiny", *words, "--json")
    assert status == 0, errors
    assert json.loads(output)["labels"]["model_accuracy"] > 0.9


def test_classes_with_fewer_images_than_are_judged_are_counted(command, colours, words):
    (colours / "rare").mkdir()
    for number in range(3):
        Image.new("RGB", (36, 36), (number, 9, 9)).save(colours / "rare" / f"{number}.png")
    _, output, _ = command("check", colours, *words)
    assert "labels that were not judged: 3 images of classes with fewer than 10 images" in output


def test_images_with_any_number_of_labels_are_not_judged(command, tmp_path, words):
    rows = ["path,labels"]
    for number in range(12):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (36, 36, 3), dtype=np.uint8)).save(
            tmp_path / f"{number}.png"
        )
        rows.append(f"{number}.png,{('a', 'b', 'a|b')[number % 3]}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    status, output, errors = command("check", tmp_path / "list.csv", *words)
    assert status == 2 or "labels were not judged: the images have any number of labels each" in output, errors


def test_data_without_a_readable_image_is_refused(command, tmp_path, words):
    for name in "ab":
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / "0.png").write_bytes(b"")
    status, _, errors = command("check", tmp_path / "bad", *words)
    assert status == 2
    assert "none of the 2 images can be read; check them without --pretrained" in errors


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("--model", CNN, "--pretrained", "hub"), f"{CNN} keeps nothing to judge labels by; give --model fuse(CNN,VIT"),
        (("--model", MODEL), "is whose parents judge labels; give their weights by --pretrained with it"),
        (("--pretrained", "absent.safetensors", "b.safetensors"), "absent.safetensors"),
    ],
)
def test_what_is_no_pair_of_parents_is_refused_before_anything_is_read(command, colours, tmp_path, given, reason):
    status, _, errors = command("check", colours, *given, "--out", tmp_path / "check")
    assert status == 2
    assert reason in errors
    assert not (tmp_path / "check").exists()


def test_weights_in_the_wrong_order_or_of_another_kind_are_refused(command, colours, parent_files, tmp_path):
    for given, reason in (
        (parent_files[::-1], "the files are in the wrong order"),
        ((parent_files[0], parent_files[0]), "does not fit"),
    ):
        status, _, errors = command("check", colours, "--model", MODEL, "--pretrained", *given, "--out", tmp_path / "c")
        assert status == 2
        assert reason in errors
        assert not (tmp_path / "c").exists()
