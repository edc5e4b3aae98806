"""The report of a comparison: which model is best, what each reached and cost, and what is missing."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from tokenfusion.compare.display import comparison_table, gaps, methods
from tokenfusion.errors import InputError
from tokenfusion.report.page import counted, write_page
from tokenfusion.report.results import read_epochs, read_json
from tokenfusion.report.verdict import fusion_against_others, headline, rank


def write_comparison(out: Path) -> Path:
    """Write `report.html` into the folder of a comparison, whole or not at all.

    Args:
        out: the folder that `compare` wrote, finished or not.

    Returns:
        The path of the report.

    Raises:
        InputError: the folder holds no comparison, or its files are damaged.
    """
    if not (out / "comparison.json").is_file():
        raise InputError(f"{out} is no folder of a comparison (it has no comparison.json); give one")
    result = read_json(out / "comparison.json")
    path = out / "report.html"
    write_page(path, "comparison.html", describe(result, read_curves(out, result)))
    return path


def describe(result: Mapping[str, Any], curves: Mapping[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """What the template tells."""
    from tokenfusion.report.comparison_plots import plot_accuracy, plot_cost

    heading, *rows = comparison_table(result)
    return {
        "result": result,
        "summary": headline(result),
        "fused": fusion_against_others(result),
        "heading": heading,
        "rows": list(zip(result["models"], rows, strict=True)),
        "methods": methods(result),
        "cost": plot_cost(result) if rank(result) else "",
        "epochs": plot_accuracy(curves) if curves else "",
        "gaps": gaps(result),
        "setting": list_setting(result),
    }


def read_curves(out: Path, result: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Held-out accuracy by epoch of each model that was trained, best first: means over its finished runs.

    Epochs that one of the runs does not have are left out.
    """
    curves = {}
    for row in rank(result):
        paths = [out / run["run"] / "metrics.jsonl" for run in row["runs"]]
        if not all(path.is_file() for path in paths):  # a mean of predictions
            continue
        runs = [{epoch["epoch"]: epoch["val_top1"] for epoch in read_epochs(path)} for path in paths]
        shared = [epoch for epoch in runs[0] if all(run.get(epoch) is not None for run in runs)]
        if shared:
            curves[row["name"]] = [(epoch, fmean(run[epoch] for run in runs)) for epoch in shared]
    return curves


def list_setting(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What all the runs share, as names and values."""
    return [
        ("Data", f"{result['data']}, {counted(result['training_images'], 'training image')}"),
        ("Budget of a run", result["budget"]),
        ("Epochs", ", ".join(f"{row['name']} {row['epochs']}" for row in result["models"] if row["epochs"])),
        ("Seeds", ", ".join(map(str, result["seeds"]))),
        ("Hardware", f"{result['hardware']}; {counted(result['threads'], 'thread')} a run, {result['precision']}"),
        ("Runs at once", str(result["jobs"])),
        ("Versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
        ("Recipe", ", ".join(f"{key} = {json.dumps(value)}" for key, value in result["recipe"].items())),
    ]
