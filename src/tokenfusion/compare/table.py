"""A comparison as text: its table, and what must be said under it."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenfusion.compare.statistics import holm
from tokenfusion.formatting import counted


def comparison_table(result: Mapping[str, Any]) -> list[list[str]]:
    """What `comparison.json` holds as text, under a line of headings."""
    headings = [
        "top-1",
        "95 % interval",
        "difference",
        "95 % interval of it",
        "p",
        "parameters M",
        "GMACs",
        "images/s",
        "minutes",
        "MiB",
    ]
    sided = any(row.get("sides") for row in result["models"])
    table = [["model", *headings, *["each side is worth"] * sided]]
    tests = corrected_tests(result)
    seeds_of_first = {run["seed"] for run in result["models"][0]["runs"]}
    for row in result["models"]:
        cost = [f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.3g}"]
        if not row["runs"]:
            table.append(
                [row["name"], "failed" if row["failed"] else "to do", "", "", "", "", *cost, "", "", "", *[""] * sided]
            )
            continue
        top1 = f"{row['top1_mean']:.2%}" + (f" ± {row['top1_sd']:.2%}" if row["top1_sd"] is not None else "")
        low, high = row["top1_ci95"] or row["top1_ci95_images"]
        test = tests.get(row["name"], {"difference_mean": None})
        if test["difference_mean"] is None:
            compared = ["", "", ""]
        else:
            shared = len(seeds_of_first & {run["seed"] for run in row["runs"]})
            fewer = f" ({counted(shared, 'seed')})" if shared < len(result["seeds"]) else ""
            compared = [f"{100 * test['difference_mean']:+.2f}{fewer}", interval_text(test["ci95"]), p_text(test["p"])]
        took = [f"{row['images_per_s']:,.0f}", f"{row['minutes']:.2f}", f"{row['peak_memory_mb']:,.0f}"]
        table.append([row["name"], top1, f"{low:.2%} to {high:.2%}", *compared, *cost, *took])
        if sided:
            table[-1].append(", ".join(side_text(side) for side in row.get("sides", [])))
    return table


def corrected_tests(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tests against the first model, by the other's name, `p` being Holm's for as many as there are."""
    corrected = holm([test["p"] for test in result["tests"]])
    return {test["name"]: test | {"p": p} for test, p in zip(result["tests"], corrected, strict=True)}


def interval_text(interval: Sequence[float] | None) -> str:
    """The interval of a difference, in percentage points."""
    return f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}" if interval else "–"


def side_text(side: Mapping[str, Any]) -> str:
    """What a fused model loses without the tokens of one side, in percentage points."""
    low, high = side["ci95"]
    return f"{side['tokens']} {100 * side['lost']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def p_text(p: float | None) -> str:
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def notes(result: Mapping[str, Any]) -> list[str]:
    """What must be said under the table."""
    return methods(result) + gaps(result)


def methods(result: Mapping[str, Any]) -> list[str]:
    """How the table's figures came about, and which models are best for their cost."""
    first, finished = result["models"][0]["name"], max(len(row["runs"]) for row in result["models"])
    interval = f"Student's t over {finished} seeds" if finished > 1 else "Wilson, over the images of one seed"
    done = [test["method"] for test in result["tests"] if test["difference_mean"] is not None]
    tests = ", ".join(dict.fromkeys(done))
    equal = [row["name"] for row in result["models"] if len(row["runs"]) > 1 and not row["top1_ci95"]]
    interval += f"; of {', '.join(equal)}, whose seeds are all equal, Wilson over the images of one" * bool(equal)
    lines = [f"budget {result['budget']} a run; 95 % interval: {interval}"]
    if tests:
        many = f"; p is Holm's for {len(done)} tests, the intervals are each alone" * (len(done) > 1)
        lines.append(f"difference: percentage points above {first}, over the seeds that both have: {tests}{many}")
    if any(row.get("sides") for row in result["models"]):
        lines.append(
            "each side is worth: percentage points lost when all its tokens are replaced by their mean, with a 95 % "
            "interval over seeds, or over the images of one (`tokenfusion analyze tokens`)"
        )
    front = ", ".join(result["pareto"])
    return [*lines, f"no other is better for as many multiply-adds: {front}"] if front else lines


def gaps(result: Mapping[str, Any]) -> list[str]:
    """Controls that are missing or not what they should be, and runs that failed."""
    lines = [f"no {one['role']} of {one['model']}: {one['reason']}" for one in result["missing_controls"]]
    lines += [f"{one['role']} of {one['model']}: {one['reason']}" for one in result["control_notes"]]
    for row in result["models"]:
        done, wanted = len(row["runs"]), len(result["seeds"])
        if 0 < done < wanted:
            over = "the images of one" if done == 1 else f"{done} seeds"
            lines.append(f"{row['name']}: {done} of {wanted} seeds only; its interval is over {over}")
        lines += [f"{row['name']} seed {failure['seed']} failed: {failure['reason']}" for failure in row["failed"]]
    return lines
