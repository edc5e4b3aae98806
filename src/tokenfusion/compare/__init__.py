"""Several models under one recipe and one budget, with several seeds: which is better, and how surely.

plan.py          what is trained, and for how long: contenders.py, budgets, recipes
jobs.py          each run in a process and a run folder of its own; progress.py shows how far they are
ensemble.py      the mean of several models' predictions
results.py       what the run folders say, as comparison.json; statistics.py tests it, table.py prints it
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tokenfusion.compare.contenders import Contender
from tokenfusion.compare.ensemble import evaluate_mean
from tokenfusion.compare.jobs import run_all
from tokenfusion.compare.plan import Budget, Comparison, plan_comparison, with_epochs
from tokenfusion.compare.progress import ComparisonProgress
from tokenfusion.compare.results import Failures, is_finished, summarise
from tokenfusion.data.exclude import EXCLUDED, keep_list
from tokenfusion.data.kinds import resolved
from tokenfusion.errors import InputError
from tokenfusion.files import lock_folder, make_folder, refuse_inside, write_json, write_text
from tokenfusion.names import split_names
from tokenfusion.recipe import Recipe, dump_recipe, number

__all__ = ["Budget", "compare", "plan_comparison", "split_names", "summarise"]


def compare(
    recipe: Recipe,
    models: Sequence[str],
    seeds: int,
    out: Path,
    *,
    budget: Budget | None = None,
    controls: bool = False,
    jobs: int = 1,
    console: Console | None = None,
    after_run: Callable[[Path], object] | None = None,
) -> dict[str, Any]:
    """Train and evaluate every model with every seed, each run in a process and a run folder of its own.

    What an earlier call finished in `out` is kept, and what it began is resumed.

    Args:
        recipe: what all runs share; its model counts for nothing, its seed is the first one.
        models: names as in `create_model`, and `mean(A,B)` for the average of two models' predictions; tests compare
            each with the first.
        seeds: runs of each model.
        out: folder for `comparison.json`, `runs/` and `logs/`.
        budget: training of each run; the recipe's epochs when not given.
        controls: whether to add what fused models must be compared with: their parents, the parents as wide as the
            fused model is costly, and the mean of the parents' predictions.
        jobs: runs at once; they share the threads.
        console: where to show progress; nowhere when not given.
        after_run: called with `out` whenever `comparison.json` is written, such as `report.write_comparison`.

    Returns:
        What `comparison.json` holds.

    Raises:
        InputError: a name, the budget or the data cannot be used, or `out` holds runs of another recipe.
        KeyboardInterrupt: Ctrl-C, once the runs under way are saved.
    """
    if seeds < 1 or jobs < 1:
        raise InputError(f"seeds={seeds} and jobs={jobs} must be 1 or more")
    refuse_recipe(recipe, budget)
    refuse_other_folder(out)
    refuse_inside(out, recipe.data)
    recipe = replace(recipe, data=resolved(recipe.data), exclude=own_list(recipe.exclude, out))
    budget = budget or Budget("epochs", number(recipe.epochs))
    comparison = plan_comparison(recipe, models, seeds, out, budget, controls=controls, jobs=jobs)
    for folder in ("runs", "logs"):
        make_folder(out / folder)
    console = console or Console(quiet=True)
    with lock_folder(out, lambda: console.print(f"{out}: a run is still going there; waiting for its end")) as lock:
        comparison = with_epochs(comparison)
        write_text(out / "recipe.toml", dump_recipe(comparison.recipe))
        return train_and_average(comparison, lock, console, after_run or (lambda _: None))


def refuse_recipe(recipe: Recipe, budget: Budget | None) -> None:
    """Refuse what not all models have, or what would be another number in each run."""
    if recipe.every:
        raise InputError(
            f"every={recipe.every} looks at attention, which not every model that is compared has; leave it out, and "
            "look at the runs by `tokenfusion analyze collapse`"
        )
    autos = [name for name in recipe.autos if name != "epochs" or budget is None]
    if autos:
        raise InputError(
            f"{autos[0]}=auto would be another number in each run, and a comparison trains all of them alike; give a "
            "number, such as the one that a run with auto has in its recipe.toml"
        )


def refuse_other_folder(out: Path) -> None:
    """Refuse a folder that holds other things than a comparison."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    ours = {"runs", "logs"} <= names or names <= {"runs", "logs", ".lock", EXCLUDED}
    if out.exists() and not (out.is_dir() and ours):
        raise InputError(f"{out} exists and is no folder of a comparison; give another --out")


def own_list(exclude: str, out: Path) -> str:
    """The comparison's own copy of a list of images to leave out, so that every run leaves out the same.

    Raises:
        InputError: the list cannot be read, or is another than before.
    """
    if not exclude:
        return ""
    kept = out / EXCLUDED
    if not kept.exists():
        make_folder(out)
        keep_list(out, exclude)
    elif Path(exclude).exists() and Path(exclude).read_bytes() != kept.read_bytes():
        raise InputError(
            f"{exclude} differs from {kept}, by which the comparison began; give --exclude {kept}, or another --out"
        )
    return str(kept.resolve())


def train_and_average(
    comparison: Comparison, lock: int, console: Console, after_run: Callable[[Path], object]
) -> dict[str, Any]:
    """Train what is not trained, then average what is to be averaged; `comparison.json` is written after every run."""
    failures = {(name, seed): why for name, why in comparison.untrainable.items() for seed in comparison.seeds}
    runs = [
        (contender.name, seed)  # all models with one seed first, so that a table begins early
        for seed in comparison.seeds
        for contender in comparison.trained
        if contender.name in comparison.epochs and not is_finished(comparison, contender, seed)
    ]

    def write() -> dict[str, Any]:
        result = summarise(comparison, failures)
        write_json(comparison.out / "comparison.json", result)
        after_run(comparison.out)
        return result

    def ended(name: str, seed: int, fault: str) -> None:
        if fault:
            failures[name, seed] = fault
        progress.print_run(name, seed, fault, write())

    write()
    with ComparisonProgress(console, comparison, runs) as progress:
        run_all(comparison, runs, lock, ended, progress.update)
    for seed in comparison.seeds:
        for contender in comparison.means:
            average(comparison, contender, seed, failures)
    return write()


def average(comparison: Comparison, contender: Contender, seed: int, failures: Failures) -> None:
    """Evaluate a mean of predictions, unless that is done, or note why it cannot be."""
    failed = [name for name in contender.members if (name, seed) in failures]
    if failed:
        failures[contender.name, seed] = f"{', '.join(failed)} failed"
    elif not is_finished(comparison, contender, seed):
        members = [comparison.run(name, seed) for name in contender.members]
        try:
            evaluate_mean(members, comparison.run(contender.name, seed))
        except InputError as error:
            failures[contender.name, seed] = str(error)
