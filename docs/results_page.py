"""What `docs/results/README.md` tells of a comparison, and its figure; all from a committed `comparison.json`.

A file from elsewhere has the same fields; a row whose `role` is "WHAT of NAME" is a control of the fused model NAME.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tokenfusion.compare.display import comparison_table, gaps, methods
from tokenfusion.report.comparison_plots import plot_cost
from tokenfusion.report.page import counted
from tokenfusion.report.plots import standalone
from tokenfusion.report.verdict import fusion_against_others, headline

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PAGE = DOCS / "results" / "README.md"
COMPARISONS = ("cifar10_comparison", "cifar10_operators")
"""Files in `benchmarks/results`, and blocks of the page."""


def table(heading: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, all but the first column aligned right."""
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heading, rule, *rows])


def comparison(name: str) -> str:
    """A comparison's verdict, figure and table; writes the figure beside the page."""
    path = RESULTS / f"{name}.json"
    assert path.exists(), f"{PAGE} has a block {name}, but {path} is not measured yet; measure, or take the block out"
    result = json.loads(path.read_text())
    (PAGE.parent / f"{name}.svg").write_text(standalone(plot_cost(result)) + "\n")
    heading, *rows = comparison_table(result)
    hardware = f"{result['hardware']}, {counted(result['threads'], 'thread')} a run, {result['precision']}"
    notes = [*methods(result), f"minutes and images/s: of training, on {hardware}", *gaps(result)]
    return "\n\n".join(
        [
            headline(result),
            *fusion_against_others(result),
            f"![Accuracy against multiply-adds, with 95 % intervals]({name}.svg)",
            table(heading, rows),
            "\n".join(f"- {note}" for note in notes),
        ]
    )


def transfer(name: str) -> str:
    """What `benchmarks/transfer.py` wrote, as a table."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    rows = []
    for row in result["rows"]:
        model, comma, how = row["name"].partition(", ")
        top1 = ", ".join(f"{value:.2%}" for value in row["top1"])
        costs = (f"{row[key] / 1e9:.3f}" for key in ("macs", "training_macs_per_image"))
        rows.append([f"`{model}`{comma}{how}", top1, *costs])
    seeds = counted(max(len(row["top1"]) for row in result["rows"]), "seed")
    epochs = f"{result['parents_epochs']} epochs of each parent, {result['warm_epochs']} of the pair made of them"
    heading = ["model", "top-1, seed by seed", "GMACs", "GMACs of forward passes in training, an image"]
    return f"{epochs}; {seeds}.\n\n{table(heading, rows)}"


def blocks() -> dict[str, Callable[[], str]]:
    """What writes each block that the page has, or must have because its comparison is measured."""
    text = PAGE.read_text()
    writers = dict.fromkeys(COMPARISONS, comparison) | {"transfer": transfer}
    wanted = [name for name in writers if f"<!-- {name} -->" in text or (RESULTS / f"{name}.json").exists()]
    return {name: partial(writers[name], name) for name in wanted}
