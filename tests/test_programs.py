"""The programs beside the package, which no other test imports, find what they import of it."""

import argparse
import ast
import importlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from tokenfusion import Classifier

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path for folder in ("benchmarks", "docs", "examples") for path in (ROOT / folder).glob("*.py"))


def imported(program):
    """Module and name of each import of the package."""
    for node in ast.walk(ast.parse(program.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0].startswith("tokenfusion"):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_what_a_program_imports_of_the_package_is_there(program):
    missing = []
    for module, name in imported(program):
        try:
            if not hasattr(importlib.import_module(module), name):
                importlib.import_module(f"{module}.{name}")
        except ModuleNotFoundError as error:
            if str(error.name).startswith("tokenfusion"):  # an extra may be missing
                missing.append(f"{module}.{name}")
    assert missing == []


def test_what_a_benchmark_calls_bf16_is_computed_in_bfloat16(monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = importlib.import_module("export")
    classifier = Classifier.create("cmt_micro", ("a", "b"), precision="fp32", device=torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, *classifier.preprocess.img_size), dtype=torch.uint8)
    exact, rounded = (program.in_torch(classifier, precision, packs=False)(images) for precision in ("fp32", "bf16"))
    assert torch.equal(exact, classifier.scores(classifier.logits(images)))
    assert not torch.equal(rounded, exact)


def test_the_benchmark_of_many_images_runs_its_models_to_the_end(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = importlib.import_module("predict")
    for number in range(4):
        Image.new("RGB", (30 + number, 20), (60 * number, 0, 0)).save(tmp_path / f"{number}.jpg")
    assert program.about(str(tmp_path)) | {"bytes": 0} == {"count": 4, "size": "32×20", "bytes": 0}
    given = argparse.Namespace(batch_size=2, in_memory=3, repetitions=1, workers=1, minutes=1)
    (row,) = program.measure(["wide(resnet_micro,0.2)"], str(tmp_path), given)
    assert row["alone"] > 0
    assert row["share"] == pytest.approx(row["predict"] / row["alone"])
