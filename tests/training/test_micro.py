"""Every micro model is trained by the command."""

import json

import pytest

from tokenfusion import Classifier, list_models

QUICK = ("--img-size", 8, "--val-fraction", 0.5, "--epochs", 1, "--lr", 4e-3, "--warmup-epochs", 1, "--ema", 0)


@pytest.mark.parametrize("name", list_models("*_micro"))
def test_an_epoch_of_digits_learns_something(command, tmp_path, name):
    status, _, errors = command("train", "digits", "--model", name, *QUICK, "--out", tmp_path / "run")
    assert status == 0, errors
    (epoch,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert epoch["train_top1"] > 0.15  # chance is 0.1
    assert Classifier.load(tmp_path / "run").name == name
