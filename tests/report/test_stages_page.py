"""The figures of docs/stages.md follow from what `benchmarks/pretrained.py` writes."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"
FEW = [
    {"count": 500, "seed": seed, "cnn": 0.5, "mean": 0.5 + seed / 8, "votes": 0.625 + seed / 8, "query": 0.625}
    for seed in (0, 1)
]
MANY = [{"count": 4000, "seed": seed, "cnn": 0.625, "mean": 0.75, "votes": 0.8125 + seed / 16} for seed in (0, 1)]
TUNED = {"all": 0.8, "all_seconds": 90.0, "fine_tuned": 0.75, "fine_tuned_minutes": 5.0}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, whose results are where a test writes them."""
    monkeypatch.syspath_prepend(str(DOCS))
    for name in ("stages_page", "results_page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import results_page  # type: ignore[import-not-found]
    import stages_page  # type: ignore[import-not-found]

    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    return stages_page


def told(page: ModuleType, folder: Path, draws: list[dict[str, float]]) -> list[str]:
    found = {"draws": draws, "test_images": 5000, "pool": 10_000, "features": "As they are."}
    (folder / "pretrained.json").write_text(json.dumps(found))
    return page.pretrained().splitlines()


def test_gains_are_paired_by_draw_and_what_is_not_measured_is_a_dash(page: ModuleType, tmp_path: Path) -> None:
    lines = told(page, tmp_path, [*FEW, *MANY])
    assert "| 500 | 2 | 50.00% | 56.25% | 68.75% | +12.50 |" in lines
    assert "| 4,000 | 2 | 62.50% | 75.00% | 84.38% | +9.38 ± 39.71 |" in lines  # t of one degree of freedom is 12.7
    assert "Not in every row more than: mean of the two." in lines
    assert "| 500 | 2 | – | – | – | – | -6.25 ± 79.41 |" in lines  # by operator, query the last
    assert "No interval is above one test image, 0.02 points: the votes alone do as well." in lines


def test_a_way_that_some_rows_lack_is_judged_by_the_others(page: ModuleType, tmp_path: Path) -> None:
    some = [draw | {"larger_260": draw["votes"] - 0.0625} for draw in FEW]
    lines = told(page, tmp_path, [*some, *MANY])
    assert (
        "Token votes name more, with intervals above 0 in every row that has both, than: larger CNN, 260 px." in lines
    )


def test_all_weights_are_told_of_the_draws_that_have_them(page: ModuleType, tmp_path: Path) -> None:
    lines = told(page, tmp_path, [FEW[0] | TUNED, FEW[1]])
    assert "| 500 | 1 | 62.50% | 80.00% | 75.00% | 1.5 | 5 |" in lines
    assert not any("All weights" in line for line in told(page, tmp_path, FEW))


@pytest.mark.parametrize(("seconds", "memory", "said"), [(300.0, 2900.0, "reached"), (300.0, 3100.0, "missed")])
def test_the_cost_is_held_against_the_aim(
    page: ModuleType, tmp_path: Path, seconds: float, memory: float, said: str
) -> None:
    row = {"photographs": 5000, "options": "--img-size 112", "stages": {"seconds": {"fit": 9.0}}}
    row |= {"seconds": {"train": seconds, "evaluate": 30.0}, "peak_mb": {"train": memory, "evaluate": 900.0}}
    found = {"rows": [row], "hardware": "AMD EPYC", "load_average_before": [0.2]}
    (tmp_path / "folder.json").write_text(json.dumps(found))
    assert f"5.5 minutes and {memory / 1000:.1f} GB (aim: less than 6 and 3, {said})" in page.cost()
