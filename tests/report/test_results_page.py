"""The page of results: which blocks it must have, and that a block's words, table and figure are of its file."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FIELDS = {
    "role": "model",
    "parameters": 450_000,
    "macs": 39_000_000,
    "epochs": 2,
    "failed": [],
    "top1_ci95_images": None,
}
MODELS = [
    {"name": "tokenfusion_late_micro", "top1_mean": 0.9, "top1_ci95": [0.89, 0.91]},
    {"name": "resnet_micro", "top1_mean": 0.88, "top1_ci95": [0.875, 0.885]},
]
RESULT = {
    "data": "photos",
    "budget": "epochs=2",
    "seeds": [0, 1, 2],
    "hardware": "AMD EPYC",
    "threads": 1,
    "precision": "bf16",
    "missing_controls": [],
    "control_notes": [],
    "pareto": ["tokenfusion_late_micro"],
    "models": [
        FIELDS
        | row
        | {"top1_sd": 0.001, "runs": [{"n": 500}], "images_per_s": 9.0, "minutes": 2.0, "peak_memory_mb": 99}
        for row in MODELS
    ],
    "tests": [{"name": "resnet_micro", "difference_mean": -0.02, "ci95": None, "p": 0.2, "method": "paired t"}],
}


@pytest.fixture
def results_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with an empty page and no results."""
    path = Path(__file__).parents[2] / "docs" / "results_page.py"
    spec = importlib.util.spec_from_file_location("results_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "results_page", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "PAGE", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("")
    return module


def test_a_block_needs_its_file_and_a_file_its_block(results_page: ModuleType) -> None:
    assert results_page.blocks() == {}
    results_page.PAGE.write_text("<!-- cifar10_comparison -->\n<!-- /cifar10_comparison -->\n")
    (results_page.RESULTS / "cifar10_operators.json").write_text(json.dumps(RESULT))
    blocks = results_page.blocks()
    assert set(blocks) == {"cifar10_operators", "cifar10_comparison"}
    with pytest.raises(
        AssertionError, match=r"a block cifar10_comparison, but .*_comparison\.json is not measured yet"
    ):
        blocks["cifar10_comparison"]()


def test_a_block_is_of_its_file(results_page: ModuleType) -> None:
    (results_page.RESULTS / "cifar10_comparison.json").write_text(json.dumps(RESULT))
    text = results_page.blocks()["cifar10_comparison"]()
    assert "tokenfusion_late_micro is best: it names 90.00% ± 0.10% of 500 images correctly." in text
    assert "It is better than resnet_micro (+2.00)." in text
    assert "| resnet_micro | 88.00% ± 0.10% | 87.50% to 88.50% | -2.00 | 0.200 | 0.45 | 0.039 | 9 | 2.00 | 99 |" in text
    assert "on AMD EPYC, 1 thread a run, bf16" in text
    assert "](cifar10_comparison.svg)" in text
    assert "resnet_micro" in (results_page.PAGE.parent / "cifar10_comparison.svg").read_text()


def test_the_transfer_block_tells_every_seed_and_what_training_cost(results_page: ModuleType) -> None:
    warm = {"name": "fuse(A,B,late), warm", "macs": 8e7, "training_macs_per_image": 4.6e8, "top1": [0.84, 0.8512]}
    (results_page.RESULTS / "transfer.json").write_text(
        json.dumps({"parents_epochs": 4, "warm_epochs": 2, "rows": [warm]})
    )
    text = results_page.blocks()["transfer"]()
    assert text.startswith("4 epochs of each parent, 2 of the pair made of them; 2 seeds.")
    assert "| `fuse(A,B,late)`, warm | 84.00%, 85.12% | 0.080 | 0.460 |" in text
