"""How far the runs of a comparison are: a bar over all their training, and a line for each run that has ended."""

from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tokenfusion.compare.plan import Comparison
from tokenfusion.history import read_history


class ComparisonProgress:
    """A bar on a terminal, and lines anywhere.

    Args:
        console: where to write.
        comparison: what is run.
        runs: name and seed of each run that is left to do.
    """

    def __init__(self, console: Console, comparison: Comparison, runs: Sequence[tuple[str, int]]) -> None:
        self.console, self.comparison, self.runs = console, comparison, runs
        self.ended: set[tuple[str, int]] = set()
        self.macs = {(name, seed): comparison.counts[name].macs * comparison.epochs[name] for name, seed in runs}
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TimeRemainingColumn())
        hidden = not console.is_terminal
        self.bar = Progress(*columns, console=console, disable=hidden, transient=True, speed_estimate_period=600)
        self.task = self.bar.add_task("", total=sum(self.macs.values()))

    def __enter__(self) -> Self:
        self.update()
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self) -> None:
        """Move the bar to where the runs are: multiply-adds of the epochs that are behind them."""
        done = 0.0
        for (name, seed), macs in self.macs.items():
            epochs = len(read_history(self.comparison.run(name, seed)))
            done += macs * (1.0 if (name, seed) in self.ended else epochs / self.comparison.epochs[name])
        self.bar.update(self.task, completed=done, description=f"{len(self.ended)} of {len(self.runs)} runs")

    def print_run(self, name: str, seed: int, fault: str, result: dict[str, Any]) -> None:
        """Print a line for a run that has ended: what it reached, by `comparison.json`, or why it failed."""
        self.ended.add((name, seed))
        self.update()
        seconds = self.bar.tasks[0].time_remaining
        left = "" if seconds is None else f"  {seconds // 60:.0f}:{seconds % 60:02.0f} left"
        if fault:
            outcome = f"failed: {fault}"
        else:
            (model,) = (row for row in result["models"] if row["name"] == name)
            (run,) = (run for run in model["runs"] if run["seed"] == seed)
            outcome = f"top-1 {run['top1']:.2%} in {run['minutes']:.2f} minutes"
        text = f"run {len(self.ended)}/{len(self.runs)}  {name} seed {seed}: {outcome}{left}"
        self.console.print(text, highlight=False, soft_wrap=True)
