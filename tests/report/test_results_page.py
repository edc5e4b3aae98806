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
        | {"top1_sd": 0.001, "runs": [{"n": 500, "seed": 0}], "images_per_s": 9.0, "minutes": 2.0, "peak_memory_mb": 99}
        for row in MODELS
    ],
    "tests": [{"name": "resnet_micro", "difference_mean": -0.02, "ci95": None, "p": 0.02, "method": "paired t"}],
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
    assert "tokenfusion_late_micro is ahead: it names 90.00% ± 0.10% of 500 images correctly." in text
    assert "It is better than resnet_micro (+2.00)." in text
    row = "| resnet_micro | 88.00% ± 0.10% | 87.50% to 88.50% | -2.00 (1 seed) | – | 0.020 | 0.45 | 0.039 "
    assert f"{row}| 9 | 2.00 | 99 |" in text
    assert "on AMD EPYC, 1 thread a run, bf16" in text
    assert "](cifar10_comparison.svg)" in text
    assert "resnet_micro" in (results_page.PAGE.parent / "cifar10_comparison.svg").read_text()


def test_the_transfer_block_tells_every_seed_and_what_training_cost(results_page: ModuleType) -> None:
    parent = {"name": "A", "macs": 4e7, "training_macs_per_image": 1.6e8, "top1": [0.83, 0.8312]}
    warm = {
        "name": "fuse(A,B,late), from its trained parents",
        "macs": 8e7,
        "training_macs_per_image": 4.6e8,
        "top1": [0.84, 0.8512],
    }
    (results_page.RESULTS / "transfer.json").write_text(
        json.dumps({"parents_epochs": 4, "warm_epochs": 2, "rows": [parent, warm]})
    )
    text = results_page.blocks()["transfer"]()
    assert text.startswith("4 epochs of each parent, 2 of the pair made of them; 2 seeds.")
    assert "`fuse(A,B,late)`, from its trained parents, in percentage points: +1.50 to `A`." in text
    assert "| `fuse(A,B,late)`, from its trained parents | 84.00%, 85.12% | 0.080 | 0.460 |" in text


def worth(*seeds: float, ci95: list[float] | None = None) -> dict[str, object]:
    return {"mean": sum(seeds) / len(seeds), "ci95": ci95, "seeds": list(seeds)}


def test_the_awake_block_names_what_is_told_apart_and_what_is_worth_a_point(results_page: ModuleType) -> None:
    row = {"model": "A", "macs": 4e7, "training_macs": 4e7, "seeds": [0, 1], "top1": worth(0.7, 0.8, ci95=[0.5, 1.0])}
    asleep = row | {"arm": "as it is", "lost without patch": worth(0.0, 0.01, ci95=[-0.04, 0.05])}
    awake = row | {"arm": "loud", "training_macs": 5e7, "lost without patch": worth(0.1, 0.12, ci95=[0.05, 0.17])}
    pixels = {"lost without pixel": worth(0.5, 0.5, ci95=[0.4, 0.6])}
    test = {"model": "A", "arm": "loud", "measure": "lost without patch", "method": "t", "p": 0.01, "p_holm": 0.02}
    test |= {"difference_mean": 0.105, "ci95": [0.05, 0.16]}
    none = test | {"measure": "top1", "difference_mean": 0.0, "ci95": [-0.1, 0.1], "p": 0.9, "p_holm": 0.9}
    arms = {"as it is": {"changes": "nothing", "expected": None}, "loud": {"changes": "all", "expected": [2.0, -0.5]}}
    budget = {"epochs": 1, "images": 1000, "held_out": 500, "hardware": "AMD EPYC", "threads": 1}
    result = budget | {"arms": arms, "rows": [asleep | pixels, awake | pixels], "tests": [test, none]}
    (results_page.RESULTS / "awake.json").write_text(json.dumps(result))
    text = results_page.blocks()["awake"]()
    assert "| loud | all | +2.0 | -0.5 |" in text
    first = "| `A` | as it is | 2 | 40.0 | 75.0 ± 25.0 % | 0.5 ± 4.5 | 50.0 ± 10.0 | – | – |"
    assert first in text
    assert "50.0 ± 10.0 | +10.5 (+5.0 to +16.0; p = 0.02) | +0.0 (-10.0 to +10.0; p = 0.9) |" in text
    said = "Told apart from the preset as it is (p < 0.05): `A`, loud: what patches are worth +10.5 (+5.0 to +16.0; "
    assert said in text
    assert "its interval over seeds above 0: `A`, loud; not: `A`, as it is." in text
    assert "1 epoch on 1,000 training images" in text


def depth_row(depth: int, re_attends: bool, top1: float, similar: int, neighbours: float) -> dict[str, object]:
    return {
        "depth": depth,
        "re_attention": re_attends,
        "seed": 0,
        "top1": top1,
        "top1_ci95": [top1 - 0.01, top1 + 0.01],
        "share_of_similar_blocks": similar / depth,
        "neighbours": {str(k): [neighbours] * (depth - k) for k in (1, 2, 3)},
        "neighbours_before_mixing": {"1": [0.99] * (depth - 1)} if re_attends else None,
        "head_similarity": [0.4] * depth,
        "share_of_uniform_entropy": [0.5, 0.7],
        "parameters": 2_340_000,
        "macs": 45_600_000,
    }


def gain(of: tuple[int, bool], above: tuple[int, bool], low: float, high: float) -> dict[str, object]:
    ends = ({"depth": depth, "re_attention": re_attends} for depth, re_attends in (of, above))
    one, other = ends
    return {"seed": 0, "of": one, "above": other, "mean": (low + high) / 2, "ci95": [low, high]}


DEPTH = {
    "epochs": 3,
    "images": 5000,
    "dim": 48,
    "hardware": "AMD EPYC",
    "threads": 1,
    "looked_at": 256,
    "rows": [
        depth_row(12, False, 0.50, 3, 0.7),
        depth_row(12, True, 0.49, 4, 0.3),
        depth_row(32, False, 0.51, 16, 0.85),
        depth_row(32, True, 0.54, 0, 0.2),
        depth_row(24, False, 0.52, 9, 0.75),  # its partner is still to do
    ],
    "differences": [
        gain((32, False), (12, False), -0.01, 0.03),
        gain((32, True), (12, True), 0.02, 0.08),
        gain((12, True), (12, False), -0.03, -0.01),
        gain((32, True), (32, False), 0.01, 0.05),
    ],
}


def test_the_depth_block_says_whether_the_finding_repeats(results_page: ModuleType) -> None:
    (results_page.RESULTS / "depth.json").write_text(json.dumps(DEPTH))
    text = results_page.blocks()["depth"]()
    assert (
        "**Attention collapses with depth: it repeats.** 3 of 12 and 16 of 32 blocks of plain ViTs are similar" in text
    )
    assert "the similarity of neighbours is 0.85 on average. Their attention has 60% of the entropy" in text
    assert "**Re-attention keeps blocks apart: not judged here.**" in text  # centred maps beside positive ones
    assert "is 0.85 for plain attention, 0.99 for Re-attention's maps before mixing and 0.20 for those after" in text
    assert "**Deeper ViTs are better with Re-attention: it repeats at depth 32.**" in text
    assert "From depth 12 to 32, top-1 with plain attention may gain or lose (+1.0 points, -1.0 to +3.0)." in text
    assert "At depth 12, Re-attention loses (-2.0 points, -3.0 to -1.0)." in text
    assert "| depth 32, Re-attention | 54.00% | 53.00% to 55.00% | 0% | 0.20 | 0.99 | 2.34 | 0.046 |" in text
    assert "depth 24" not in text
    assert "over the images of one seed" in text
    for figure in ("accuracy", "collapse"):
        assert f"](depth_{figure}.svg)" in text
        assert "Re-attention" in (results_page.PAGE.parent / f"depth_{figure}.svg").read_text()


def test_the_depth_block_says_what_does_not_repeat(results_page: ModuleType) -> None:
    level = [row | {"share_of_similar_blocks": 1.0} for row in DEPTH["rows"]]
    none = [of | {"mean": 0, "ci95": [-0.01, 0.01]} for of in DEPTH["differences"]]
    (results_page.RESULTS / "depth.json").write_text(json.dumps(DEPTH | {"rows": level, "differences": none}))
    text = results_page.blocks()["depth"]()
    assert "**Attention collapses with depth: it does not repeat" in text
    assert "**Deeper ViTs are better with Re-attention: it does not repeat at this scale.**" in text


def test_half_of_the_depths_are_no_result(results_page: ModuleType) -> None:
    (results_page.RESULTS / "depth.json").write_text(json.dumps(DEPTH | {"rows": DEPTH["rows"][:3]}))
    with pytest.raises(AssertionError, match="fewer than two depths"):
        results_page.blocks()["depth"]()


@pytest.mark.parametrize(("finished", "said"), [(2, "Student's t over 2 seeds"), (1, "Wilson, over the images of one")])
def test_intervals_are_over_the_seeds_that_finished(results_page: ModuleType, finished: int, said: str) -> None:
    runs = [{"n": 500, "seed": seed} for seed in range(finished)]  # of three that were asked for
    rows = [row | {"runs": runs} for row in RESULT["models"]]
    (results_page.RESULTS / "cifar10_comparison.json").write_text(json.dumps(RESULT | {"models": rows}))
    assert f"95 % interval: {said}" in results_page.blocks()["cifar10_comparison"]()
