"""The growth section of docs/scale.md: how its figures follow from its file."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def growth_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with a file of its own: memory of N and of N², no times."""
    monkeypatch.syspath_prepend(str(DOCS))
    for name in ("growth_page", "results_page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import growth_page  # type: ignore[import-not-found]

    sizes = [
        {"layer": layer, "what": what, "pixels": pixels, "tokens": tokens, "macs": tokens**k, "memory_mb": tokens**k}
        for layer, k in (("cross-attention of CLS", 1), ("Re-attention", 2))
        for what in ("inference", "training")
        for pixels, tokens in ((448, 785), (224, 197))  # in no order
    ]
    batches = [
        {"model": "deepvit_16", "what": what, "batch": batch, "memory_mb": 90.0 + 10 * batch}
        for what in ("inference", "training")
        for batch in (1, 4)
    ]
    images = [
        {"what": what, "images": count, "memory_mb": count / 2**10}
        for what in ("index of a folder", "linear classifier", "near duplicates")
        for count in (1000, 10_000)
        if (what, count) != ("near duplicates", 10_000)
    ]
    images.append({"what": "near duplicates", "images": 2000, "memory_mb": 4.0})
    found = {
        "hardware": "AMD EPYC",
        "kept_bytes_an_image": 119_136,
        "kept_images_at_most": 450_626,
        "cache_gb": 50,
        "near_duplicates_at_most": 100_000,
        "sizes": sizes,
        "batches": batches,
        "images": images,
    }
    for name in ("sizes", "batches", "images"):
        for row in found[name]:
            row["seconds"] = None
    (tmp_path / "growth.json").write_text(json.dumps(found))
    monkeypatch.setattr(growth_page, "RESULT", tmp_path / "growth.json")
    monkeypatch.setattr(growth_page, "FIGURE", tmp_path / "growth.svg")
    return growth_page


def test_the_page_tells_what_is_linear_and_what_is_not(growth_page: ModuleType) -> None:
    text = growth_page.growth()
    assert "| cross-attention of CLS, training | 197 | 785 | 1.0 | 1.0 | – |" in text
    assert "| Re-attention, inference | 38,809 | 616,225 | 2.0 | 2.0 | – |" in text
    assert "| `deepvit_16`, inference | 100 | 130 | 10.0 |" in text
    assert "| index of a folder | 1.0 | – | 9.8 | 1,024 | 1.0 | – |" in text
    assert "Training one layer on one image of 448 px took 601.8 GiB" in text
    assert "450,626 images fill the cache of 50 GiB" in text
    assert "Times are not measured yet" in text


def test_the_figure_has_both_lines_of_theory(growth_page: ModuleType) -> None:
    growth_page.growth()
    drawn = growth_page.FIGURE.read_text()
    assert all(label in drawn for label in ("∝ N<", "∝ N²", "Re-attention", "cross-attention of CLS"))


def test_without_a_file_the_page_says_how_to_measure(growth_page: ModuleType) -> None:
    growth_page.RESULT.unlink()
    assert growth_page.growth().startswith("Not measured yet: `python benchmarks/growth.py --out ")
