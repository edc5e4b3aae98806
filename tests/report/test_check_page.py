"""The figures of docs/check.md follow from what `benchmarks/check.py` writes."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def row(by: str, found: int, disputed: int) -> dict[str, Any]:
    ranks = [rank for rank in (25, 100, 300) if rank <= disputed]
    precision = {"precision": dict.fromkeys(ranks, 0.75), "estimated_precision": dict.fromkeys(ranks, 0.5)}
    return {"by": by, "flipped": 50, "disputed": disputed, "found_among_first_600": found} | precision


@pytest.fixture
def check_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with a file of its own: faults in one set, labels in two."""
    monkeypatch.syspath_prepend(str(DOCS))
    for name in ("check_page", "results_page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import check_page  # type: ignore[import-not-found]
    import results_page  # type: ignore[import-not-found]

    judged = {"planted": {"empty": 30, "cropped": 100}, "recall": {"empty": 1.0, "cropped": 0.97}}
    judged |= {"near_duplicate_recall": 0.985, "false_alarm_rate": 0.0012}
    timed = {"load_average_before": 0.2, "seconds": 31.25, "feature_seconds": 12.0, "peak_mb": 1500}
    photographs = {
        "hardware": "AMD EPYC", "images": 1000, "faults": {"thumbnails": judged}, "timed": {"parents": timed},
        "labels": [row("thumbnails", 20, 99), row("parents", 40, 120), row("parents", 44, 100)],
    }  # fmt: skip
    small = {"hardware": "AMD EPYC", "images": 2000, "labels": [row("parents", 50, 300)]}
    (tmp_path / "check.json").write_text(json.dumps({"photographs": photographs, "small": small}))
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    return check_page


def test_faults_and_times_are_told_of_the_set_in_which_they_were_planted(check_page: ModuleType) -> None:
    text = check_page.check()
    assert text.count("Of faults planted among") == 1
    assert "| cropped | 100 | 97.0% |" in text
    assert "98.5% were found (aim: 99%); 0.1% of the sound" in text
    assert "By two pretrained parents it took 31.2 s, of which 12 s looking (aim: 60 s besides looking)" in text


def test_the_aim_is_held_against_sets_with_flips_enough(check_page: ModuleType) -> None:
    assert "Aim" not in check_page.check()
    rows = [row("parents", found, 580) | {"flipped": 500} for found in (440, 450)]
    assert "the first 600: 89.0% on large (missed)." in check_page.aim({"large": {"labels": rows}})
    assert "the first 600: 90.0% on large (reached)." in check_page.aim({"large": {"labels": rows[1:]}})


def test_labels_are_the_mean_of_the_draws_and_ranks_that_one_lacks_are_dashes(check_page: ModuleType) -> None:
    rows = [line for line in check_page.check().splitlines() if line.startswith(("| photographs", "| small"))]
    assert rows == [
        "| photographs, 1,000 | thumbnails | 1 | 50 | 99 | 20 | 75% (50%) | – | – |",
        "| photographs, 1,000 | two pretrained parents | 2 | 50 | 110 | 42 | 75% (50%) | 75% (50%) | – |",
        "| small, 2,000 | two pretrained parents | 1 | 50 | 300 | 50 | 75% (50%) | 75% (50%) | 75% (50%) |",
    ]
