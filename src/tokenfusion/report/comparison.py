"""The report of a comparison: which model is best, what each reached and cost, and what is missing."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from tokenfusion.compare.table import comparison_table, gaps, methods
from tokenfusion.errors import InputError
from tokenfusion.files import own_results
from tokenfusion.formatting import counted
from tokenfusion.history import read_history
from tokenfusion.json_files import AGAIN, NUMBER, damaged, read_json
from tokenfusion.report.comparison_summary import fusion_against_others, headline, rank
from tokenfusion.report.page import write_page
from tokenfusion.report.run_folder import FieldTypes, require_fields

RESULT: FieldTypes = (
    dict.fromkeys(("data", "budget", "hardware", "precision"), str)
    | dict.fromkeys(("training_images", "jobs", "threads"), int)
    | dict.fromkeys(("recipe", "versions"), dict)
    | dict.fromkeys(("seeds", "models", "tests", "pareto", "missing_controls", "control_notes"), list)
)
MODEL: FieldTypes = {"name": str, "role": str, "parameters": int, "macs": int, "epochs": int | None} | dict.fromkeys(
    ("runs", "failed"), list
)
FINISHED: FieldTypes = dict.fromkeys(("top1_mean", "images_per_s", "minutes", "peak_memory_mb"), NUMBER) | {
    "top1_sd": NUMBER | None
}
RUN: FieldTypes = {"run": str, "n": int}
FAILURE: FieldTypes = {"seed": int, "reason": str}
TEST: FieldTypes = {"name": str, "method": str, "difference_mean": NUMBER | None, "p": NUMBER | None}
CONTROL: FieldTypes = dict.fromkeys(("model", "role", "reason"), str)


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
    path = out / "report.html"
    with own_results(out):
        result = read_json(out / "comparison.json", AGAIN)
        check_comparison(result, out / "comparison.json")
        write_page(path, "comparison.html", comparison_values(result, read_curves(out, result)))
    return path


def check_comparison(result: Any, path: Path) -> None:
    """Refuse a comparison.json that a report cannot be made of.

    Raises:
        InputError: fields are missing or of another type, or it names models that it does not have.
    """
    require_fields(result, RESULT, path)
    if not result["models"]:
        raise damaged(path, "it has no model")
    for row in result["models"]:
        require_fields(row, MODEL, path)
        for run in row["runs"]:
            require_fields(run, RUN, path)
        for failure in row["failed"]:
            require_fields(failure, FAILURE, path)
        if row["runs"]:
            require_fields(row, FINISHED, path)
            interval = row.get("top1_ci95") or row.get("top1_ci95_images")
            if not isinstance(interval, list) or [isinstance(end, NUMBER) for end in interval] != [True, True]:
                raise damaged(path, f"the interval of {row['name']} is {interval!r:.60}")
    for test in result["tests"]:
        require_fields(test, TEST, path)
    for control in [*result["missing_controls"], *result["control_notes"]]:
        require_fields(control, CONTROL, path)
    finished = [row["name"] for row in result["models"] if row["runs"]]
    if unknown := [name for name in result["pareto"] if name not in finished]:
        raise damaged(path, f"pareto names {unknown[0]!r}, which has no finished run")


def comparison_values(result: Mapping[str, Any], curves: Mapping[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """What the template tells."""
    from tokenfusion.report.comparison_plots import looks_of, plot_accuracy, plot_cost

    heading, *rows = comparison_table(result)
    return {
        "result": result,
        "summary": headline(result),
        "fused": fusion_against_others(result),
        "heading": heading,
        "rows": list(zip(result["models"], rows, strict=True)),
        "methods": methods(result),
        "cost": plot_cost(result) if rank(result) else "",
        "epochs": plot_accuracy(curves, looks_of(result)) if any(len(line) > 1 for line in curves.values()) else "",
        "gaps": gaps(result),
        "setting": list_setting(result),
    }


def read_curves(out: Path, result: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Held-out accuracy by epoch of each model that was trained, best first: means over its finished runs.

    Epochs that one of the runs does not have are left out.
    """
    curves = {}
    for row in rank(result):
        runs = [{epoch["epoch"]: epoch["val_top1"] for epoch in read_history(out / run["run"])} for run in row["runs"]]
        if not all(runs):  # a mean of predictions
            continue
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
