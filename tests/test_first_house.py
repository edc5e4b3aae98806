"""What was written before the house was rebuilt still loads, answers and resumes.

`fixtures/first_house` holds two runs of one recipe, one of them stopped after 29 of 66 steps, and what the first
house's fused models and parents computed with weights that follow from their names (`filled`); `fixtures/probe.json.gz`
what a probe did before its forward was written in the letters of its equation.
"""

import gzip
import json
import math
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tokenfusion
from runs import records_of
from tokenfusion.checkpoint import load_weights_exactly
from tokenfusion.training import resume

OLD = Path(__file__).parent / "fixtures" / "first_house"
FILES = OLD / "models.json.gz", OLD.parent / "probe.json.gz"
MODELS = {name: old for file in FILES for name, old in json.loads(gzip.decompress(file.read_bytes())).items()}


def filled(name, shape):
    """A tensor that follows from its name alone, of a size that keeps a network's numbers in range."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    count = math.prod(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = (torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1).view(shape)
    if name.endswith("gate.weight"):
        return (0.5 + 0.4 * values).float()
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return (1 + 0.3 * values).float()
    fan_in = max(count // shape[0], 1) if len(shape) > 1 else 16
    return (values * fan_in**-0.5).float()


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_the_first_house_compute_what_they_did(name):
    old = MODELS[name]
    model = tokenfusion.create_model(name, num_classes=5, **old["arguments"]).eval()
    load_weights_exactly(model, {key: filled(key, shape) for key, shape in old["tensors"].items()}, OLD)
    images = filled("images", (2, 3, old["img_size"], old["img_size"])) * 30
    with torch.inference_mode():
        torch.testing.assert_close(model(images), torch.tensor(old["logits"]), rtol=1e-4, atol=1e-4)


def test_a_finished_run_of_the_first_house_is_judged_as_it_was(tmp_path, command):
    run = shutil.copytree(OLD / "finished", tmp_path / "run")
    before = json.loads((OLD / "finished" / "evaluation.json").read_text())
    status, _, errors = command("evaluate", run)
    assert status == 0, errors
    after = json.loads((run / "evaluation.json").read_text())
    assert after["top1"] == before["top1"]
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
    for words in (["report", run], ["push", run, "org/name"]):
        assert command(*words)[0] == 0
    assert "divide logits by 1." in (run / "hub" / "README.md").read_text()


def test_an_interrupted_run_of_the_first_house_ends_as_it_would_have(tmp_path):
    """Up to rounding, which the number of threads and the CPU decide: it began at a held-out loss of 1.9."""
    run = shutil.copytree(OLD / "interrupted", tmp_path / "run")
    resume(run, Console(quiet=True))
    for now, then in zip(records_of(run), records_of(OLD / "finished"), strict=True):
        for key in ("step", "lr", "train_loss", "train_top1", "val_loss", "val_top1"):
            assert now[key] == pytest.approx(then[key], abs=0.04), key
