"""The command `explain`: overlays that stay in their folder, and in the report."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tokenfusion import Classifier, InputError
from tokenfusion.analyze.explain import Question, explain, overlay, probabilities_of, safe
from tokenfusion.evaluate import evaluate
from tokenfusion.report import write_report
from tokenfusion.report.pictures import overlays_of


def test_overlays_of_named_images(command, run, digit, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    out = tmp_path / "out"
    status, output, errors = command("explain", run, digit, bad, "--topk", 2, "--out", out)
    assert (status, "bad.png: " in errors) == (1, True)
    assert "4 overlays of 1 images" in output
    found = json.loads((out / "explain.json").read_text())
    good, failed = found["images"]
    assert set(failed) == {"path", "error"}
    prediction = Classifier.load(run).predict(digit, topk=2)[0]
    assert good["prediction"] == prediction.label
    assert [(drawn["branch"], drawn["class"]) for drawn in good["overlays"]] == [
        (branch, label) for label, _ in prediction.topk for branch in ("cnn", "transformer")
    ]
    assert {path.name for path in out.iterdir()} == {"explain.json", *(drawn["file"] for drawn in good["overlays"])}
    for drawn in good["overlays"]:
        with Image.open(out / drawn["file"]) as picture:
            assert picture.size == (224, 224)  # 8×8 pixels, enlarged


def test_where_no_named_image_can_be_read_what_was_drawn_before_stays(command, run, digit, tmp_path):
    out = tmp_path / "out"
    assert command("explain", run, digit, "--topk", 1, "--out", out)[0] == 0
    before = (out / "explain.json").read_bytes()
    for name in ("none.png", "nor.png"):
        (tmp_path / name).write_bytes(b"no image")
    status, _, errors = command("explain", run, tmp_path / "none.png", tmp_path / "nor.png", "--out", out)
    assert (status, "none.png, and 1 more: " in errors, "nothing was written" in errors) == (2, True, True)
    assert (out / "explain.json").read_bytes() == before


def test_the_overlay_is_hot_where_the_map_is():
    picture = torch.zeros(1, 7, 14, dtype=torch.uint8)
    drawn = overlay(picture, torch.tensor([[0.0, 1.0]])).float()
    assert drawn.shape == (3, 7 * 16, 14 * 16)
    red, _, blue = drawn.mean(1)  # along the width
    assert red[-1] > blue[-1]
    assert blue[:90].mean() > red[:40].mean()
    assert overlay(picture, torch.zeros(3, 3)).float().std() < 40  # nothing is looked at: one colour


def test_names_never_leave_the_folder(run, tmp_path):
    classifier = Classifier.load(run)
    classes = ["../../up", "/root", "..", *classifier.classes[3:]]
    description = json.loads((run / "model.json").read_text()) | {"classes": classes}
    (run / "model.json").write_text(json.dumps(description))
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = Image.fromarray(np.full((9, 9), 99, np.uint8))
    for name in ("..png", "a b;c%2f..%2fx.png", "é" * 60 + ".png", ".hidden.png"):
        pixels.save(photos / name, "png")
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    names = sorted(map(str, photos.iterdir()))
    found, folder = explain(run, names, Question(topk=10), out=tmp_path / "out")
    files = [drawn["file"] for image in found["images"] for drawn in image["overlays"]]
    assert len(files) == len(set(files)) == 4 * 10 * 2
    assert all((folder / file).parent == folder and (folder / file).is_file() for file in files)
    assert {path for path in tmp_path.rglob("*") if "out" not in path.parts} == before
    assert (safe("../../up"), safe(".."), safe("")) == ("up", "x", "x")


def test_the_worst_mistakes_are_in_the_report(command, run):
    status, _, errors = command("explain", run)
    assert (status, "has not been evaluated" in errors) == (2, True)
    assert command("evaluate", run)[0] == 0
    wrong = round((1 - json.loads((run / "evaluation.json").read_text())["top1"]) * 359)
    shown = min(wrong, 24)
    assert shown > 0
    before = write_report(run).read_text().count("data:image/png")
    status, output, _ = command("explain", run, "--branch", "cnn")
    assert f"{shown} overlays of {shown} images" in output
    page = write_report(run).read_text()
    assert page.count("data:image/png") == before + shown
    assert page.count("<small>gradcam, cnn</small>") == shown
    shutil.copy(run / "explain" / "mistakes" / "explain.json", run / "kept.json")
    (run / "explain" / "mistakes" / "explain.json").write_text('{"method": "gradcam", "images": [{}]}')
    with pytest.raises(InputError, match="incomplete: it lacks path"):
        write_report(run)


def test_without_a_mistake_the_least_sure_right_answers_are_explained_and_it_is_said(command, run):
    assert command("evaluate", run)[0] == 0
    heading, *lines = (run / "predictions.csv").read_text().splitlines()
    rows = [line.rsplit(",", 3) for line in lines]
    right = [",".join([path, prediction, prediction, score]) for path, _, prediction, score in rows]
    (run / "predictions.csv").write_text("\n".join([heading, *right]))
    status, output, errors = command("explain", run, "--branch", "cnn")
    assert status == 0, errors
    assert output.startswith(
        "the evaluation found no mistake to explain; these are the right answers that it was least"
    )
    found = json.loads((run / "explain" / "least-sure" / "explain.json").read_text())
    least = sorted((float(score), path) for path, _, _, score in rows)[:8]
    assert [image["path"] for image in found["images"]] == [path for _, path in least]
    assert (found["chosen"], (run / "explain" / "mistakes").exists()) == ("least sure", False)


def test_mistakes_are_explained_as_the_evaluation_named_them(command, run):
    assert command("evaluate", run)[0] == 0
    heading, *lines = (run / "predictions.csv").read_text().splitlines()
    rows = [line.rsplit(",", 3) for line in lines]
    named = {path: str((int(label) + 5) % 10) for path, label, prediction, _ in rows if prediction != label}

    def name(predictions):
        new = [",".join([path, label, predictions.get(path, label), score]) for path, label, _, score in rows]
        (run / "predictions.csv").write_text("\n".join([heading, *new]))

    name(named)
    found, _ = explain(run, (), Question(branch="cnn"))
    for image in found["images"]:
        assert image["prediction"] == named[image["path"]]
        assert [drawn["class"] for drawn in image["overlays"]] == [image["prediction"]]
    name(dict.fromkeys(named, "x"))
    with pytest.raises(InputError, match="prediction='x' is not known"):
        explain(run)


def test_probabilities_are_those_that_are_predicted(run):
    batch = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = {}
    for precision in ("bf16", "fp32"):
        classifier = replace(Classifier.load(run), precision=precision)
        found[precision] = probabilities_of(classifier, classifier.to_input(batch)).cpu()
        torch.testing.assert_close(found[precision], (classifier.logits(batch) / classifier.temperature).softmax(1))
    assert not found["bf16"].equal(found["fp32"])


def test_mistakes_whose_names_are_not_text_are_in_the_report(run, digit, tmp_path):
    label = Classifier.load(run).predict(digit)[0].label
    folder = tmp_path / "photos" / str((int(label) + 1) % 10)
    folder.mkdir(parents=True)
    shutil.copy(digit, os.fsencode(folder) + b"/\xff.png")
    evaluate(run, str(tmp_path / "photos"), out=run)
    written = (run / "predictions.csv").read_bytes()
    for name in (rb"\udcff", b"\xff"):  # as `evaluate` spells it, and as the file is called
        (run / "predictions.csv").write_bytes(written.replace(rb"\udcff", name))
        explain(run, (), Question(branch="cnn"))
        assert write_report(run).read_text().count("<small>gradcam, cnn</small>") == 1
        shutil.rmtree(run / "explain")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"method": "gradcam", "images": 5}, "images is 5"),
        ({"method": "gradcam", "images": [{"path": []}]}, r"path is \[\]"),
        ({"method": "gradcam", "images": [{"path": "a", "overlays": 3}]}, "overlays is 3"),
        ({"method": "gradcam", "images": [{"path": "a", "overlays": [{"branch": "cnn"}]}]}, "lacks class, file"),
        (
            {"method": "gradcam", "images": [{"path": "a", "overlays": [{"branch": 1, "class": "b", "file": "c"}]}]},
            "branch is 1",
        ),
        ([], "lacks method, images"),
    ],
)
def test_damaged_overlays_are_refused(tmp_path, found, reason):
    folder = tmp_path / "explain" / "mistakes"
    folder.mkdir(parents=True)
    (folder / "explain.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=reason):
        overlays_of(tmp_path)


def test_faithfulness_is_measured_on_held_out_images(command, run, digit):
    status, output, _ = command("explain", run, digit, "--faithfulness", 20, "--method", "rollout", "--branch", "cnn")
    assert status == 0
    measured = json.loads((run / "explain" / "explain.json").read_text())["faithfulness"]
    assert measured["images"] == 20
    for way in ("deletion", "insertion"):
        kinds = measured["cnn"][way]
        difference = kinds["map"]["mean"] - kinds["random"]["mean"]
        assert kinds["map_minus_random"]["mean"] == pytest.approx(difference)
        assert kinds["map_minus_random"]["ci95"][0] < difference < kinds["map_minus_random"]["ci95"][1]
        assert 0 < kinds["centre"]["mean"] < 1
    assert "cnn, 20 images: deletion (lower is better) map 0." in output


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--class", "eleven"], "class='eleven' is not known"),
        (["--class", "3", "--topk", "2"], "is one class; leave out --topk"),
        (["--topk", "0"], "explains no class"),
        (["--faithfulness", "-1"], "faithfulness=-1 is no number of images"),
        (["--method", "rollout", "--topk", "2"], "is the same for every class"),
    ],
)
def test_questions_without_an_answer(command, run, digit, options, reason):
    status, _, errors = command("explain", run, digit, *options)
    assert (status, reason in " ".join(errors.split())) == (2, True)


def test_a_class_that_was_not_predicted(run, digit):
    found, _ = explain(run, [str(digit)], Question(of_class="7", branch="transformer"))
    (drawn,) = found["images"][0]["overlays"]
    assert (drawn["class"], drawn["branch"]) == ("7", "transformer")
    expected = dict(Classifier.load(run).predict(digit, topk=10)[0].topk)["7"]
    assert drawn["score"] == pytest.approx(expected, abs=0.01)
