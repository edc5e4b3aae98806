"""A run on images with any number of classes, from data to report: digits as even, high (5 to 9) and with a loop."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from runs import interrupt_at, small_recipe
from tokenfusion import Classifier, InputError
from tokenfusion.checkpoint import load_tensors
from tokenfusion.data.open import open_dataset
from tokenfusion.evaluate import evaluate
from tokenfusion.export import artefact
from tokenfusion.multilabel import tune_thresholds
from tokenfusion.training import Interrupted, resume, start
from tokenfusion_runtime.output import print_predictions
from tokenfusion_runtime.prediction import Prediction

QUIET = Console(quiet=True)
LABELS = {"even": (0, 2, 4, 6, 8), "high": (5, 6, 7, 8, 9), "loop": (0, 6, 8, 9)}


def cell_of(digit: int) -> str:
    return "|".join(name for name, digits in LABELS.items() if digit in digits)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A CSV of 600 digits; 1, 3 have no label at all."""
    folder = tmp_path_factory.mktemp("digits")
    source = open_dataset("digits")
    rows = ["path,labels"]
    for index in range(600):
        Image.fromarray(source.decode(index, 64)[0].numpy()).save(folder / f"{index}.png")
        rows.append(f"{index}.png,{cell_of(int(source.labels[index]))}")
    (folder / "digits.csv").write_text("\n".join(rows))
    return folder / "digits.csv"


def recipe_of(data: Path, **changes):
    values = {"model": "wide(vit_micro,0.5)", "epochs": 10, "batch_size": 32, "ema": 0.0}
    return small_recipe(data=str(data), **values | changes)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run that was trained and evaluated."""
    run = tmp_path_factory.mktemp("multilabel") / "run"
    start(recipe_of(data, mixup=0.2), run, QUIET)
    evaluate(run)
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_learns_and_logs_map(finished):
    records = lines_of(finished / "metrics.jsonl")
    result = json.loads((finished / "evaluation.json").read_text())
    assert result["map"] > 0.9
    assert result["map"] == pytest.approx(records[-1]["val_map"])
    assert result["loss"] == pytest.approx(records[-1]["val_loss"], rel=1e-4)
    assert result["map_ci95"][0] < result["map"] < result["map_ci95"][1]
    assert records[-1]["train_exact_match"] > records[0]["train_exact_match"]
    assert not {"val_top1", "train_top1"} & set(records[-1])


def test_shipped_thresholds_are_tuned_on_all_held_out_images_and_judged_on_halves(finished):
    classifier = Classifier.load(finished)
    assert classifier.multi_label
    rows = list(csv.DictReader((finished / "predictions.csv").open()))
    folder = Path(classifier_data(finished)).parent
    found = classifier.predict([folder / row["path"] for row in rows], topk=3)
    scores = np.array([[dict(p.topk)[name] for name in classifier.classes] for p in found])
    labels = np.array([[name in row["labels"].split("|") for name in classifier.classes] for row in rows])
    assert classifier.thresholds == pytest.approx(tune_thresholds(scores, labels), abs=1e-5)
    result = json.loads((finished / "evaluation.json").read_text())
    assert result["cross_fitted"]
    said = [[name in row["predictions"].split("|") for name in classifier.classes] for row in rows]
    assert result["exact_match"] == pytest.approx((np.array(said) == labels).all(1).mean())


def classifier_data(run: Path) -> str:
    return json.loads((run / "evaluation.json").read_text())["data"]


def test_other_images_are_judged_by_the_shipped_thresholds(run, data, tmp_path):
    other = tmp_path / "other.csv"
    shutil.copytree(data.parent, tmp_path / "images")
    rows = data.read_text().splitlines()[1:101]
    other.write_text("path,labels\n" + "\n".join(f"images/{row}" for row in rows))
    result = evaluate(run, str(other), out=run)
    assert result["n"] + result["trained_on"] == 100
    assert not result["cross_fitted"]
    rows = list(csv.DictReader((run / "predictions.csv").open()))
    found = Classifier.load(run).predict([tmp_path / row["path"] for row in rows])
    assert [{label for label, _ in p.labels} for p in found] == [
        set(row["predictions"].split("|")) - {""} for row in rows
    ]


def test_data_of_fewer_classes_in_another_order_fits(run, data, tmp_path):
    # `loop` is in no label here, so that the model's third output is nobody's
    shutil.copytree(data.parent, tmp_path / "images")
    rows = [row.split(",") for row in data.read_text().splitlines()[1:101]]
    cells = ["|".join(name for name in ("high", "even") if name in cell.split("|")) for _, cell in rows]
    lines = [f"images/{path},{cell}" for (path, _), cell in zip(rows, cells, strict=True)]
    (tmp_path / "some.csv").write_text("path,labels\n" + "\n".join(lines))
    result = evaluate(run, str(tmp_path / "some.csv"), with_training_images=True)
    assert result["per_class"]["loop"]["n"] == 0
    assert result["per_class"]["loop"]["ap"] is None
    assert result["per_class"]["even"]["n"] == sum("even" in cell for cell in cells)
    assert result["per_class"]["even"]["ap"] > 0.9


def test_predictions_name_all_that_reach_their_thresholds(run, data, command):
    paths = [data.parent / f"{index}.png" for index in range(20)]
    found = Classifier.load(run).predict(paths, topk=2)
    thresholds = dict(zip(Classifier.load(run).classes, Classifier.load(run).thresholds, strict=True))
    for prediction in found:
        assert all(score >= thresholds[label] for label, score in prediction.labels)
        assert len(prediction.topk) == 2
        assert [score for _, score in prediction.labels] == sorted((s for _, s in prediction.labels), reverse=True)
    assert len({len(prediction.labels) for prediction in found}) > 1
    status, output, _ = command("predict", run, *paths, "--topk", 2, "--format", "json")
    assert status == 0
    for line, prediction in zip(output.splitlines(), found, strict=True):
        said = json.loads(line)
        assert list(said) == ["path", "labels", "topk"]
        assert [(row["label"], row["score"]) for row in said["labels"]] == list(prediction.labels)
        assert all(row["threshold"] == thresholds[row["label"]] for row in said["labels"] + said["topk"])
    status, output, _ = command("predict", run, *paths, "nothing.png", "--topk", 2, "--format", "csv")
    assert status == 1
    *rows, last = csv.DictReader(output.splitlines())
    assert list(last) == ["path", "labels", "scores", "label_1", "score_1", "label_2", "score_2", "error"]
    for row, prediction in zip(rows, found, strict=True):
        assert row["labels"] == "|".join(label for label, _ in prediction.labels)
        assert row["scores"].count("|") == row["labels"].count("|")
        assert [(row[f"label_{i}"], float(row[f"score_{i}"])) for i in (1, 2)] == [
            (label, pytest.approx(score, abs=1e-6)) for label, score in prediction.topk
        ]
    assert last["error"]
    assert not any(last[name] for name in last if name not in ("path", "error"))
    assert command("predict", run, *paths)[0] == 0


def test_the_table_shows_why_a_class_is_not_given(capsys):
    limits = {"cat": 0.25, "dog": 0.7071, "emu": 0.5}
    scores = (("dog", 0.7012), ("cat", 0.301))
    prediction = Prediction("a.png", scores, labels=scores[1:], thresholds=limits)
    print_predictions([prediction], "table", topk=2, multi_label=True)
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split(maxsplit=2) == ["image", "labels", "below their thresholds"]
    assert line.split(maxsplit=1)[1].strip().split("  ") == ["cat 30.1%", "dog 70.1% < 70.7%"]


def test_a_run_that_was_stopped_ends_bit_equal(data, tmp_path):
    recipe = recipe_of(data, model="wide(vit_micro,0.2)", epochs=2, patience=2, balance="loss")
    start(recipe, tmp_path / "whole", QUIET)
    with pytest.raises(Interrupted):
        start(recipe, tmp_path / "run", QUIET, listener=interrupt_at(20))
    resume(tmp_path / "run", QUIET)
    (one, _), (other, _) = (load_tensors(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(tensor.equal(other[name]) for name, tensor in one.items())
    described = [json.loads((tmp_path / name / "model.json").read_text()) for name in ("whole", "run")]
    assert described[0]["thresholds"] == described[1]["thresholds"] != [0.5] * 3


def test_patience_keeps_the_epoch_of_the_best_map(data, tmp_path):
    changes = {"model": "wide(vit_micro,0.2)", "epochs": 60, "patience": 1, "lr": 0.05, "warmup_epochs": 0.0}
    start(recipe_of(data, **changes), tmp_path / "run", QUIET)
    scores = [record["val_map"] for record in lines_of(tmp_path / "run" / "metrics.jsonl")]
    best = scores.index(max(scores))
    assert len(scores) == best + 2 < 60
    assert evaluate(tmp_path / "run")["map"] == pytest.approx(scores[best])


def test_tensorboard_reads_map(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "events")).Reload()
    logged = [event.value for event in events.Scalars("val_map")]
    assert logged == pytest.approx([record["val_map"] for record in lines_of(finished / "metrics.jsonl")])


def test_the_report_has_a_row_a_class_and_the_worst_by_loss(run, command):
    assert command("report", run)[0] == 0
    page = (run / "report.html").read_text()
    result = json.loads((run / "evaluation.json").read_text())
    for name, row in result["per_class"].items():
        assert f"<bdi>{name}</bdi></th><td>{row['n']}</td><td>{row['ap']:.1%}</td>" in page
        assert f"<td>{row['threshold']:.3f}</td>" in page
    assert "Exact match and mAP (%)" in page
    assert "Accuracy (%)" not in page
    assert "Confusion" not in page
    assert "Calibration" not in page
    wrong = [row for row in csv.DictReader((run / "predictions.csv").open()) if row["labels"] != row["predictions"]]
    assert wrong
    worst = sorted(wrong, key=lambda row: -float(row["loss"]))[:24]
    at = [page.index(f"<bdi>{row['path']}</bdi>") for row in worst]
    assert at == sorted(at)
    assert page.count("data:image/png") == len(worst)
    assert "Risk against coverage" in page
    rows = list(csv.DictReader((run / "predictions.csv").open()))
    for name, curve in result["risk_coverage"].items():
        wrong = [(name in row["labels"].split("|")) != (name in row["predictions"].split("|")) for row in rows]
        assert curve["risk"][-1] == pytest.approx(np.mean(wrong), abs=1e-6)
        assert curve["risk"][len(curve["risk"]) // 2] <= curve["risk"][-1]  # of the surest half fewer are wrong


def test_the_report_of_a_run_without_an_evaluation(run, command):
    (run / "evaluation.json").unlink()
    assert command("report", run)[0] == 0
    best = lines_of(run / "metrics.jsonl")[-1]["val_map"]
    assert f"its last epoch reached {best:.2%} mAP" in (run / "report.html").read_text()


def test_the_command_says_what_was_measured(run, command):
    status, output, _ = command("evaluate", run)
    result = json.loads((run / "evaluation.json").read_text())
    assert status == 0
    assert f"mAP {result['map']:.2%} (95 % interval" in output
    assert output.startswith(f"{result['n']} images: the held-out images of ")
    assert "thresholds that were tuned on the other half" in output


def test_what_makes_no_sense_is_refused_with_the_reason(run, data, tmp_path, command):
    for words, reason in [
        (["compare", data, "--models", "vit_micro,resnet_micro", "--out", tmp_path / "c"], "any number of classes"),
        (["analyze", "tokens", run], "an analysis is of the decision for one"),
        (["analyze", "collapse", "vit_micro", data], "an analysis is of the decision for one"),
        (["explain", run], "an analysis is of the decision for one"),
        (["evaluate", run, "digits"], "has one class an image, but the model was trained on any number"),
        (["train", data, "--balance", "sampling", "--out", tmp_path / "t"], "give --balance loss"),
    ]:
        status, _, errors = command(*words)
        assert status == 2, words
        assert reason in errors, errors


def test_data_of_several_classes_does_not_suit_a_model_of_one(trained, data):
    with pytest.raises(InputError, match="has any number of classes an image, but the model was trained on one"):
        evaluate(trained, str(data))


@pytest.mark.parametrize("thresholds", [[0.5, 0.5], [0.5, 0.5, 1.5], [0.5, 0.5, "x"], []])
def test_thresholds_that_cannot_be_are_damage(run, thresholds):
    described = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(described | {"thresholds": thresholds}))
    with pytest.raises(InputError, match=r"thresholds=.* which are not 3 scores from 0 to 1"):
        Classifier.load(run)


def test_runs_of_the_first_format_are_read_as_they_were(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    described = json.loads((run / "model.json").read_text())
    del described["multi_label"], described["thresholds"]
    (run / "model.json").write_text(json.dumps(described | {"format": 1}))
    assert not Classifier.load(run).multi_label


def test_its_export_answers_alike_and_leaves_the_same_classes_open(finished, data, tmp_path):
    said = artefact.export(finished, tmp_path / "out", format="pt2")
    assert said["parity"]["label_agreement"] == 1.0
    assert said["thresholds"] == list(Classifier.load(finished).thresholds)
    paths = [data.parent / f"{index}.png" for index in range(40)]
    run = replace(Classifier.load(finished), precision="fp32").predict(paths, abstain=0.1)
    exported = artefact.load(tmp_path / "out").predict(paths, abstain=0.1)
    assert [dict(one.labels).keys() for one in exported] == [dict(one.labels).keys() for one in run]
    assert [one.unsure for one in exported] == [one.unsure for one in run]
    assert any(one.unsure for one in run)
