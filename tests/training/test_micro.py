"""Every micro model is trained by the command."""

import json

import pytest

from tokenfusion import Classifier, list_models

QUICK = ("--img-size", 8, "--val-fraction", 0.7, "--epochs", 1, "--lr", 4e-3, "--warmup-epochs", 1, "--ema", 0)


@pytest.mark.parametrize("name", list_models("*_micro"))
def test_an_epoch_of_digits_learns_something(command, tmp_path, name):
    status, _, errors = command("train", "digits", "--model", name, *QUICK, "--out", tmp_path / "run")
    assert status == 0, errors
    (epoch,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # chance is 0.1; CrossViT learns late in so few steps, and the statistics of a BatchNorm judge later still
    assert max(epoch["train_top1"], epoch["val_top1"]) > 0.2
    assert Classifier.load(tmp_path / "run").name == name
