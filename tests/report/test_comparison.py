"""The report of a comparison, read back from folders whose figures were worked out by hand."""

import json
import re
from html import unescape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from xml.etree import ElementTree

import pytest

from tokenfusion.compare.statistics import pareto_front
from tokenfusion.errors import InputError
from tokenfusion.metrics import t_interval
from tokenfusion.report import write_comparison
from tokenfusion.report.comparison_plots import accuracy_range, looks_of, plot_accuracy, plot_cost, spread
from tokenfusion.report.comparison_summary import fusion_against_others, headline, overlap
from tokenfusion.report.plots import standalone

FUSED, CNN, VIT = "tokenfusion_late_micro", "resnet_micro", "vit_micro"
EVIL = "<b>&$x^{ mean"


def model(name: str, top1: list[float], role: str = "model", macs: int = 40_000_000, **changes: Any) -> dict[str, Any]:
    """A line of `models`, with seeds 0, 1 and so on."""
    runs = [
        {
            "seed": seed,
            "top1": one,
            "top1_ci95_images": [one - 0.1, one + 0.1],
            "n": 500,
            "run": f"runs/{name[:3]}-{seed}",
        }
        for seed, one in enumerate(top1)
    ]
    several = len(top1) > 1
    row = {"name": name, "role": role, "parameters": 450_000, "macs": macs, "epochs": 2, "runs": runs, "failed": []}
    row |= {"images_per_s": 1234.0, "minutes": 2.5, "peak_memory_mb": 612.0} if runs else {}
    row |= {"top1_mean": fmean(top1) if top1 else None, "top1_sd": stdev(top1) if several else None}
    row |= {"top1_ci95": list(t_interval(top1) or ()) or None}
    row |= {"top1_ci95_images": runs[0]["top1_ci95_images"] if len(top1) == 1 else None}
    return row | changes


def comparison(*models: dict[str, Any], seeds: int = 3, **changes: Any) -> dict[str, Any]:
    """What `comparison.json` holds of these."""
    tests = [
        {"name": row["name"], "difference_mean": 0.01, "ci95": None, "p": 0.005, "method": "a test"} for row in models
    ]
    points = {row["name"]: (row["macs"], row["top1_mean"]) for row in models if row["runs"]}
    result = {"data": "photos", "training_images": 1438, "recipe": {"lr": 0.002}, "budget": "epochs=2"}
    result |= {
        "seeds": list(range(seeds)),
        "hardware": "AMD EPYC, 2 cores",
        "precision": "bf16",
        "jobs": 1,
        "threads": 2,
    }
    result |= {"versions": {"torch": "2.14.1"}, "models": list(models), "tests": tests[1:]}
    return result | {"pareto": pareto_front(points), "missing_controls": [], "control_notes": []} | changes


def page(out: Path, result: dict[str, Any]) -> str:
    (out / "comparison.json").write_text(json.dumps(result))
    return write_comparison(out).read_text(encoding="utf-8")


def words(page: str) -> str:
    """What a reader sees of a page: no tags, no styles, no figures."""
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).split())


# means 90, 88 and 80 %; of three seeds 0.002 apart the interval is 4.3027 * 0.002 / sqrt(3) = 0.497 % to either side
CLEAR = [
    model(FUSED, [0.898, 0.900, 0.902]),
    model(CNN, [0.878, 0.880, 0.882]),
    model(VIT, [0.798, 0.800, 0.802], macs=60_000_000),
]


def test_a_clear_winner_by_hand() -> None:
    assert headline(comparison(*CLEAR)) == (
        f"Of the 3 models with finished runs, {FUSED} is ahead: it names 90.00% ± 0.20% of 500 images correctly. "
        f"The next is {CNN}, 2.00 percentage points below: more than chance (p 0.010, a test). "
        "Not told apart from it: none. Fewer than 5 seeds: a hint, no claim rests on it."
    )
    assert fusion_against_others(comparison(*CLEAR)) == [
        f"{FUSED}, 90.00%, is better than all of the 2 models compared with it. "
        f"It is better than {CNN} (+2.00) and {VIT} (+10.00, at 1.50× the multiply-adds)."
    ]


def test_two_models_are_told_apart_by_their_test_corrected_for_how_many_there_are() -> None:
    close = model(CNN, [0.893, 0.895, 0.897])  # 0.5 % below: 89.997 % at most, where 89.503 % is the winner's least
    assert overlap(CLEAR[0], close)
    result = comparison(CLEAR[0], close, CLEAR[2])
    assert "Not told apart from it: none." in headline(result)  # the test is sharper than the intervals
    result["tests"][0]["p"] = 0.0421  # below 0.05 alone, and with another test of p 0.005 as well: Holm's second step
    assert "more than chance (p 0.042, a test)" in headline(result)
    result["tests"][1]["p"] = 0.06  # and now it is the first of two: twice 0.0421
    said = headline(result)
    assert "0.50 percentage points below: no difference can be told (p 0.084, a test)." in said
    assert f"Not told apart from it: {CNN} and {VIT}." in said
    [fused] = fusion_against_others(result)
    assert "is better than none of the 2 models compared with it" in fused
    assert f"Not told apart from {CNN} (+0.50)" in fused
    assert "either may be the better" not in said


def test_what_each_side_is_worth_stands_in_the_table_and_an_idle_side_in_words(tmp_path: Path) -> None:
    sides = [{"tokens": "pixel", "lost": 0.895, "ci95": [0.88, 0.91], "seeds": 1}]
    sides.append({"tokens": "patch", "lost": 0.0, "ci95": [-0.015, 0.015], "seeds": 1})
    result = comparison(CLEAR[0] | {"sides": sides}, *CLEAR[1:])
    text = words(page(tmp_path, result))
    assert "pixel 89.5 (88.0 to 91.0), patch 0.0 (-1.5 to 1.5)" in text
    assert "Its patch tokens are worth nothing that could be told: it is as right without them." in text
    assert "Its pixel tokens" not in text


def test_models_without_a_test_are_told_apart_by_their_intervals() -> None:
    close, first = model(CNN, [0.893, 0.895, 0.897]), model("cmt_micro", [0.798, 0.800, 0.802])
    said = headline(comparison(first, CLEAR[0], close))
    assert f"The next is {CNN}, 0.50 percentage points below; their 95% intervals overlap, without a test." in said
    assert f"Not told apart from it: {CNN}." in said


def test_intervals_that_touch_overlap() -> None:
    low, high = (model("a", [0.5, 0.5], top1_ci95=[0.4, 0.6]), model("b", [0.7, 0.7], top1_ci95=[0.6, 0.8]))
    assert overlap(low, high)
    assert not overlap(low, model("c", [0.7, 0.7], top1_ci95=[0.601, 0.8]))


def test_a_fused_model_that_loses_is_told() -> None:
    result = comparison(CLEAR[1], model(FUSED, [0.848, 0.850, 0.852]), CLEAR[2])
    assert f"Of the 3 models with finished runs, {CNN} is ahead" in headline(result)
    [fused] = fusion_against_others(result)
    assert f"It is worse than {CNN} (-3.00)." in fused


def test_controls_are_compared_with_their_own_model_only() -> None:
    other = "tokenfusion_early_micro"
    result = comparison(
        *(CLEAR[0], model(other, [0.91, 0.911, 0.909])),
        model("cnn(a)", [0.7, 0.701, 0.699], f"CNN parent of {FUSED}"),
        model("cnn(b)", [0.6, 0.601, 0.599], f"CNN parent of {other}; widened CNN parent of {other}"),
        model("mean(a,b)", [0.5, 0.501, 0.499], f"mean of the parents of {FUSED}; mean of the parents of {other}"),
    )
    early, late = fusion_against_others(result)
    assert early.startswith(other)
    assert early.endswith(
        "It is better than cnn(b) (CNN parent, widened CNN parent, +31.00) and mean(a,b) (mean of the parents, +41.00)."
    )
    assert late.endswith("It is better than cnn(a) (CNN parent, +20.00) and mean(a,b) (mean of the parents, +40.00).")


def test_models_that_are_level_are_all_named() -> None:
    said = headline(comparison(model("a", [0.9, 0.8, 0.7]), model("b", [0.7, 0.8, 0.9]), model("c", [0.5, 0.6, 0.7])))
    assert said.startswith("Of the 3 models with finished runs, a and b are level ahead: each names 80.00% ± 10.00% of")
    assert "The next is c, 20.00 percentage points below" in said
    both = headline(comparison(model("a", [0.8, 0.8]), model("b", [0.8, 0.8]), seeds=2))
    assert "a and b are level ahead" in both
    assert "The next is" not in both


def colours_of(svg: str) -> dict[str, str]:
    """The colour of the line that leads to each model's name."""
    before = {name: svg[: svg.index(f">{name}</text>")] for name in (FUSED, CNN, VIT)}
    return {name: re.findall(r"stroke: (var\(--series-\d\))", part)[-1] for name, part in before.items()}


def test_a_model_has_one_colour_in_all_figures() -> None:
    ranked_otherwise = [CLEAR[2], CLEAR[0], CLEAR[1]]
    looks = looks_of(comparison(*ranked_otherwise))
    assert len({colour for colour, _ in looks.values()}) == 3
    in_one = plot_cost(comparison(*ranked_otherwise))
    in_other = plot_accuracy({FUSED: [(1, 0.5)], VIT: [(1, 0.4)], CNN: [(1, 0.3)]}, looks)
    assert len(set(colours_of(in_one).values())) == 3
    assert colours_of(in_one) == colours_of(in_other)
    many = looks_of({"models": [{"name": str(number)} for number in range(24)]})
    assert len(set(many.values())) == 24


def test_what_one_and_two_seeds_do_not_tell() -> None:
    one = comparison(model(FUSED, [0.9]), model(CNN, [0.85]), seeds=1)
    assert "they do not tell what another seed gives" in headline(one)
    one["tests"][0]["p"] = None
    assert "their 95% intervals overlap" in headline(one)  # of images: 0.8 to 1.0 and 0.75 to 0.95
    # t is 12.706 at one degree of freedom, over the square root of two: 8.98 standard deviations
    low, high = t_interval([0.9, 0.91]) or (0, 0)
    assert (high - low) / 2 / stdev([0.9, 0.91]) == pytest.approx(8.98, abs=0.01)
    two = comparison(model(FUSED, [0.9, 0.91]), model(CNN, [0.85, 0.86]), seeds=2)
    assert "9 standard deviations to either side" in headline(two)


def test_intervals_of_different_kinds_are_said_to_be() -> None:
    said = headline(comparison(CLEAR[0], model(CNN, [0.85]), model(VIT, [0.8, 0.81])))
    assert f"Intervals are of different kinds: of {CNN}, with one finished run, over images alone" in said
    assert f"Of two seeds ({VIT}) an interval is 9 standard deviations" in said
    only_one_yet = headline(comparison(model(FUSED, [0.9]), model(CNN, [0.85])))  # of three seeds that were asked for
    assert "4 runs still to do. Of one seed the intervals are over images alone" in only_one_yet
    assert "different kinds" not in only_one_yet + headline(comparison(*CLEAR))


def test_failed_runs_and_missing_controls_are_shown(tmp_path: Path) -> None:
    broken = model("cmt_micro", [], failed=[{"seed": 1, "reason": "the loss is <nan> & not finite"}])
    missing = [{"model": FUSED, "role": "widened CNN parent", "reason": "no width fits"}]
    text = words(page(tmp_path, comparison(*CLEAR, broken, missing_controls=missing)))
    assert "cmt_micro seed 1 failed: the loss is <nan> & not finite" in text
    assert f"no widened CNN parent of {FUSED}: no width fits" in text
    assert "cmt_micro failed 0.45 0.04" in text  # its line of the table
    assert "1 run failed. 2 runs still to do." in text
    assert "Nothing: no run failed" in words(page(tmp_path, comparison(*CLEAR)))


def test_the_first_model_failed(tmp_path: Path) -> None:
    result = comparison(
        model(VIT, []), *CLEAR[:2], tests=[{"name": FUSED, "difference_mean": None, "p": None, "method": "no"}]
    )
    assert f"{VIT}, with which tests compare, has no finished run." in headline(result)
    assert "to do" in words(page(tmp_path, result))


def test_before_the_first_run_ends(tmp_path: Path) -> None:
    text = page(tmp_path, comparison(model(FUSED, []), model(CNN, [])))
    assert "No model of this comparison has a finished run. 6 runs still to do." in words(text)
    assert "<svg" not in text


def test_names_are_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    for seed in range(3):
        run = tmp_path / f"runs/{EVIL[:3]}-{seed}"
        run.mkdir(parents=True)
        line = {"lr": 0.1, "train_loss": 1, "train_top1": 0.1, "val_loss": 1, "val_top1": 0.5, "seconds": 1}
        (run / "metrics.jsonl").write_text(json.dumps(line | {"epoch": 1, "images_per_s": 1}) + "\n")
    text = page(tmp_path, comparison(model(EVIL, [0.5, 0.6, 0.7], role=EVIL), *CLEAR, data=EVIL))
    assert "<b>" not in text
    assert text.count("&lt;b&gt;&amp;$x^{ mean") >= 5  # title, table, role, and both figures
    assert "://" not in text
    assert not re.search(r"<(script|link|iframe|img|a)\b|@import", text)
    assert "default-src 'none'" in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_curves_are_means_over_seeds_at_epochs_that_all_have(tmp_path: Path) -> None:
    from tokenfusion.report.comparison import read_curves

    line = {"lr": 0.1, "train_loss": 1, "train_top1": 0.1, "val_loss": 1, "seconds": 1, "images_per_s": 1}
    for seed, accuracies in enumerate([(0.2, 0.4, 0.9), (0.4, 0.5), (0.6, None)]):
        run = tmp_path / f"runs/tok-{seed}"
        run.mkdir(parents=True)
        lines = [line | {"epoch": epoch, "val_top1": one} for epoch, one in enumerate(accuracies, start=1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert read_curves(tmp_path, comparison(*CLEAR)) == {FUSED: [(1, pytest.approx(0.4))]}


def test_labels_keep_their_distance_and_order() -> None:
    # two that want one place part by half the gap each; the third is far enough
    assert spread([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    assert spread([0.9, 0.1, 0.12], 0.1) == pytest.approx([0.9, 0.06, 0.16])
    assert spread([1.0, 1.0, 1.0], 0.2) == pytest.approx([0.6, 0.8, 1.0])


def test_a_wide_interval_does_not_flatten_the_figure() -> None:
    wide = [model("a", [0.5, 0.5], top1_ci95=[-3.0, 4.0]), model("b", [0.6, 0.6], top1_ci95=[0.59, 0.61])]
    # means 50 and 60 %, ten points to either side, and a twentieth of these thirty as margin
    assert accuracy_range(wide) == pytest.approx((38.5, 71.5))


def test_a_figure_stands_alone() -> None:
    svg = standalone(plot_cost(comparison(*CLEAR)))
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = {"".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {FUSED, CNN, VIT, "Top-1 accuracy (%)"} <= texts
    assert set(re.findall(r"var\((--[\w-]+)\)", svg)) <= set(re.findall(r"(--[\w-]+):", svg))


def test_what_is_no_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no comparison\.json"):
        write_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(InputError, match=r"comparison\.json is not JSON"):
        write_comparison(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda found: found.pop("seeds"), "lacks seeds"),
        (lambda found: found.update(models={}), r"models is \{\}"),
        (lambda found: found.update(models=[]), "it has no model"),
        (lambda found: found["models"].append(7), "lacks name, role"),
        (lambda found: found["models"][1].update(top1_mean="88 %"), "top1_mean is '88 %'"),
        (lambda found: found["models"][1].update(top1_ci95=None), "the interval of resnet_micro is None"),
        (lambda found: found["models"][1].update(top1_ci95=[0.8]), "the interval of resnet_micro"),
        (lambda found: found["models"][0]["runs"][2].pop("run"), "lacks run"),
        (lambda found: found["tests"][0].update(p="small"), "p is 'small'"),
        (lambda found: found["pareto"].append("nobody"), "pareto names 'nobody'"),
        (lambda found: found["missing_controls"].append({"model": FUSED}), "lacks role, reason"),
    ],
)
def test_a_damaged_comparison_is_refused(tmp_path: Path, change: Any, reason: str) -> None:
    found = json.loads(json.dumps(comparison(*CLEAR)))
    change(found)
    with pytest.raises(InputError, match=rf"comparison\.json .*{reason}"):
        page(tmp_path, found)


def test_the_command_writes_it_of_a_comparison(tmp_path: Path, command: Any) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(comparison(*CLEAR)))
    status, output, _ = command("report", tmp_path)
    assert status == 0
    assert output.strip() == f"open {tmp_path / 'report.html'}"
    assert "Comparison of 3 models" in (tmp_path / "report.html").read_text()
