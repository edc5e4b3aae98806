"""The programs beside the package, which no other test imports, find what they import of it."""

import ast
import importlib
from pathlib import Path

import pytest
import torch

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
