"""What the run folders of a comparison say, as `comparison.json`."""

import csv
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import timm
import torch

from tokenfusion.compare.contenders import Contender
from tokenfusion.compare.ensemble import is_up_to_date
from tokenfusion.compare.plan import Comparison
from tokenfusion.compare.statistics import crossed_t, mcnemar, paired_t, pareto_front
from tokenfusion.errors import InputError
from tokenfusion.hardware import default_device, hardware_name, resolve_precision
from tokenfusion.history import read_history
from tokenfusion.json_files import read_json
from tokenfusion.metrics import t_interval
from tokenfusion.version import __version__

Failures = dict[tuple[str, int], str]
"""Why runs failed, by name and seed."""
Runs = dict[int, dict[str, Any]]
"""What a contender's finished runs reached, by seed."""
ANEW = "delete it, and the same command writes it anew"


def summarise(comparison: Comparison, failures: Failures) -> dict[str, Any]:
    """What `comparison.json` holds, of the runs that are finished.

    Args:
        comparison: what was settled.
        failures: why runs failed, by name and seed.

    Raises:
        InputError: runs of one seed were evaluated on different images.
    """
    runs: dict[str, Runs] = {}
    for contender in [*comparison.trained, *comparison.means]:
        finished = [seed for seed in comparison.seeds if is_finished(comparison, contender, seed)]
        runs[contender.name] = {seed: read_run(comparison, contender, seed, runs) for seed in finished}
    refuse_different_images(comparison, runs)
    models = [model_row(comparison, contender, runs[contender.name], failures) for contender in comparison.contenders]
    points = {row["name"]: (row["macs"], row["top1_mean"]) for row in models if row["runs"]}
    device = default_device()
    recipe = {key: value for key, value in asdict(comparison.recipe).items() if key not in ("model", "seed", "epochs")}
    return {
        "data": comparison.recipe.data,
        "training_images": comparison.training_images,
        "recipe": recipe,
        "budget": str(comparison.budget),
        "seeds": list(comparison.seeds),
        "hardware": hardware_name(device),
        "precision": resolve_precision(comparison.recipe.precision, device),
        "jobs": comparison.jobs,
        "threads": comparison.threads,
        "versions": {
            "tokenfusion": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "models": models,
        "tests": [test_against_first(comparison, row["name"], runs) for row in models[1:]],
        "pareto": pareto_front(points),
        "missing_controls": list(comparison.missing),
        "control_notes": list(comparison.notes),
    }


def is_finished(comparison: Comparison, contender: Contender, seed: int) -> bool:
    """Whether a run is trained and was last evaluated on its own held-out images."""
    run = comparison.run(contender.name, seed)
    if contender.members:
        finished = all(is_finished(comparison, Contender(name, "member"), seed) for name in contender.members)
        return finished and is_up_to_date(run, [comparison.run(name, seed) for name in contender.members])
    if not all((run / name).exists() for name in ("model.safetensors", "evaluation.json", "predictions.csv")):
        return False
    evaluation = read_json(run / "evaluation.json", ANEW)
    return (evaluation.get("data"), evaluation.get("split")) == (comparison.recipe.data, comparison.split)


def read_run(comparison: Comparison, contender: Contender, seed: int, runs: Mapping[str, Runs]) -> dict[str, Any]:
    """What a finished run reached and took; a mean takes what its members take together, one after the other."""
    run = comparison.run(contender.name, seed)
    evaluation = read_json(run / "evaluation.json", ANEW)
    if contender.members:
        members = [runs[name][seed] for name in contender.members]
        minutes = sum(member["minutes"] for member in members)
        rate = 1 / sum(1 / member["images_per_s"] for member in members)
        memory = max(member["peak_memory_mb"] for member in members)
    else:
        records = read_history(run)
        minutes = sum(record["seconds"] for record in records) / 60
        rate = median(record["images_per_s"] for record in records)
        memory = max(record["peak_memory_mb"] for record in records)
    return {
        "seed": seed,
        "top1": evaluation["top1"],
        "top1_ci95_images": evaluation["top1_ci95"],
        "loss": evaluation["loss"],
        "n": evaluation["n"],
        "minutes": minutes,
        "images_per_s": rate,
        "peak_memory_mb": memory,
        "run": str(run.relative_to(comparison.out)),
        "sides": sides_of_run(run),
    }


def sides_of_run(run: Path) -> list[dict[str, Any]]:
    """What `analyze tokens` said of a run: the share of images lost without either side's tokens, and its interval."""
    path = run / "tokens" / "tokens.json"
    if not path.exists():
        return []
    whole = [row for row in read_json(path, ANEW)["replaced"] if row["layer"] == "whole branch"]
    return [
        {"tokens": row["tokens"], "lost": -row["top1_change"]["mean"]}
        | {"ci95": [-end for end in reversed(row["top1_change"]["ci95"])]}
        for row in whole
    ]


def sides_of_model(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean over the seeds of what is lost without either side; the interval is over seeds, or of the only one."""
    by_side: dict[str, list[dict[str, Any]]] = {}
    for side in (side for run in runs for side in run["sides"]):
        by_side.setdefault(side["tokens"], []).append(side)
    return [
        {"tokens": tokens, "lost": fmean(side["lost"] for side in sides), "seeds": len(sides)}
        | {"ci95": list(t_interval([side["lost"] for side in sides]) or sides[0]["ci95"])}
        for tokens, sides in by_side.items()
    ]


def model_row(comparison: Comparison, contender: Contender, runs: Runs, failures: Failures) -> dict[str, Any]:
    """One contender's object in `comparison.json`; what no run has shown yet is None."""
    counts = [comparison.counts[name] for name in contender.members or (contender.name,)]
    rows = list(runs.values())
    top1 = [row["top1"] for row in rows]
    interval = t_interval(top1) if top1 and max(top1) - min(top1) > 1e-9 else None  # of equal seeds it has no width
    return {
        "name": contender.name,
        "role": contender.role,
        "parameters": sum(count.parameters for count in counts),
        "macs": sum(count.macs for count in counts),
        "epochs": None if contender.members else comparison.epochs.get(contender.name),
        "runs": rows,
        "top1_mean": fmean(top1) if top1 else None,
        "top1_sd": stdev(top1) if len(top1) > 1 else None,
        "top1_ci95": [max(interval[0], 0.0), min(interval[1], 1.0)] if interval else None,
        "top1_ci95_images": rows[0]["top1_ci95_images"] if rows and not interval else None,
        "images_per_s": median(row["images_per_s"] for row in rows) if rows else None,
        "minutes": fmean(row["minutes"] for row in rows) if rows else None,
        "peak_memory_mb": max(row["peak_memory_mb"] for row in rows) if rows else None,
        "sides": sides_of_model(rows),
        "failed": [{"seed": seed, "reason": why} for (name, seed), why in failures.items() if name == contender.name],
    }


def test_against_first(comparison: Comparison, name: str, runs: Mapping[str, Runs]) -> dict[str, Any]:
    """A contender against the first one.

    Where all seeds hold out the same images, seeds and images are both random (`crossed_t`). Where each seed holds out
    its own, the seeds that both have are paired.
    """
    first = comparison.contenders[0].name
    seeds = sorted(runs[name].keys() & runs[first].keys())
    if not seeds:
        return {"name": name, "difference_mean": None, "ci95": None, "p": None, "method": "no seed that both have"}
    lines = [[predictions(comparison.run(one, seed)) for seed in seeds] for one in (name, first)]
    right, reference = ([[row["label"] == row["prediction"] for row in run] for run in runs_of] for runs_of in lines)
    if len(seeds) == 1:
        return {"name": name, **mcnemar(right[0], reference[0])}
    values, of_first = ([runs[one][seed]["top1"] for seed in seeds] for one in (name, first))
    if any([row["path"] for row in run] != [row["path"] for row in lines[0][0]] for run in lines[0]):
        return {"name": name, **paired_t(values, of_first)}
    shares = [[fmean(of_image) for of_image in zip(*one, strict=True)] for one in (right, reference)]
    groups = [row["group"] for row in lines[0][0]] if lines[0][0] and "group" in lines[0][0][0] else None
    return {"name": name, **crossed_t(values, of_first, [a - b for a, b in zip(*shares, strict=True)], groups)}


def refuse_different_images(comparison: Comparison, runs: Mapping[str, Runs]) -> None:
    """Refuse runs of one seed that were not evaluated on the same images; each seed may hold out images of its own."""
    for seed in comparison.seeds:
        first: tuple[Path, Sequence[tuple[str, str]]] | None = None
        for name in runs:
            if seed not in runs[name]:
                continue
            run = comparison.run(name, seed)
            images = [(row["path"], row["label"]) for row in predictions(run)]
            first = first or (run, images)
            if images != first[1]:
                raise InputError(
                    f"{run} was evaluated on other images than {first[0]} ({len(images)} and {len(first[1])}), so that "
                    "they cannot be compared; delete both folders, and the same command trains them anew"
                )


def predictions(run: Path) -> list[dict[str, str]]:
    """The lines of a run's `predictions.csv`."""
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
