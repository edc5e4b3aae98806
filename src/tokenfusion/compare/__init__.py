"""Several models under one recipe and one budget, with several seeds: which is better, and how surely."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tokenfusion.compare.contenders import Contender, contenders, slug, split_names
from tokenfusion.compare.display import Display, comparison_table, notes
from tokenfusion.compare.ensemble import evaluate_mean
from tokenfusion.compare.jobs import Job, hold, run_jobs
from tokenfusion.compare.plan import Budget, Comparison
from tokenfusion.compare.results import is_finished, summarise
from tokenfusion.data.dataset import held_out_name
from tokenfusion.data.exclude import EXCLUDED, keep_list
from tokenfusion.data.open import open_dataset, resolved
from tokenfusion.data.split import choose_split
from tokenfusion.errors import InputError
from tokenfusion.files import write_json, write_text
from tokenfusion.models.cost import count_model
from tokenfusion.recipe import Recipe, dump_recipe, load_recipe
from tokenfusion.training import FREE_TO_CHANGE

__all__ = ["Budget", "compare", "comparison_table", "notes", "split_names"]


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
    console = console or Console(quiet=True)
    require_own_folder(out)
    recipe = replace(recipe, data=resolved(recipe.data), exclude=own_list(recipe.exclude, out))
    comparison = settle(recipe, models, seeds, out, budget or Budget("epochs", recipe.epochs), controls, jobs)
    try:
        for folder in ("runs", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}; give another --out") from error
    with hold(out, console) as lock:
        comparison = with_epochs(comparison)
        write_text(out / "recipe.toml", dump_recipe(comparison.recipe))
        return run_all(comparison, lock, console, after_run or (lambda _: None))


def require_own_folder(out: Path) -> None:
    """Refuse a folder that holds other things than a comparison."""
    made = {"runs", "logs", EXCLUDED}
    ours = out.is_dir() and ((out / ".lock").is_file() or {path.name for path in out.iterdir()} <= made)
    if out.exists() and not ours:
        raise InputError(f"{out} exists and is no folder of a comparison; give another --out")


def own_list(exclude: str, out: Path) -> str:
    """The comparison's own copy of a list of images to leave out, so that every run leaves out the same.

    Raises:
        InputError: the list cannot be read, or is another than before.
    """
    if not exclude:
        return ""
    kept = out / EXCLUDED
    if kept.exists() and Path(exclude).exists() and Path(exclude).read_bytes() != kept.read_bytes():
        raise InputError(
            f"{exclude} differs from {kept}, by which the comparison began; give --exclude {kept}, or another --out"
        )
    if not kept.exists():
        out.mkdir(parents=True, exist_ok=True)
        keep_list(out, exclude)
    return str(kept.resolve())


def settle(
    recipe: Recipe, models: Sequence[str], seeds: int, out: Path, budget: Budget, controls: bool, jobs: int
) -> Comparison:
    """All that can be known without training; a budget in minutes leaves the epochs open."""
    source = open_dataset(recipe.data, recipe.exclude)
    if source.multi_label:
        raise InputError(
            f"{source.where} has any number of classes an image; a comparison ranks models by the share of images that "
            "they name correctly, of one class each: train and evaluate the models one by one"
        )
    classes = len(source.classes)
    training_images = len(choose_split(source, recipe.val_fraction, recipe.seed).train)
    everyone, missing, remarks = contenders(models, recipe, classes, controls)
    task: dict[str, Any] = {"num_classes": classes, "in_chans": recipe.in_chans, "img_size": recipe.img_size or None}
    comparison = Comparison(
        out=out,
        recipe=recipe,
        contenders=everyone,
        seeds=tuple(range(recipe.seed, recipe.seed + seeds)),
        budget=budget,
        epochs={},
        counts={one.name: count_model(one.name, **task)[0] for one in everyone if not one.members},
        missing=missing,
        notes=remarks,
        part=held_out_name(source) or "val",
        training_images=training_images,
        jobs=jobs,
        threads=max(torch.get_num_threads() // jobs, 1),
    )
    return comparison if budget.unit == "minutes" else with_epochs(comparison)


def with_epochs(comparison: Comparison) -> Comparison:
    """The comparison with the epochs that the budget pays for; minutes are measured.

    Raises:
        InputError: less than one epoch of a model, or none can be trained.
    """
    if comparison.epochs:
        return comparison
    failed: dict[str, str] = {}
    if comparison.budget.unit == "epochs":
        costs = dict.fromkeys(comparison.counts, 1.0)
    elif comparison.budget.unit == "macs":
        costs = {name: float(one.macs * comparison.training_images) for name, one in comparison.counts.items()}
    else:
        from tokenfusion.compare.timing import epoch_minutes

        kept = comparison.out / "timing.json"
        costs, failed = epoch_minutes(comparison.trained, comparison.recipe, comparison.threads, kept)
        if not costs:
            raise InputError(next(iter(failed.values())))
    settled = replace(comparison, epochs=comparison.budget.epochs(costs), untrainable=failed)
    require_same_recipes(settled)
    return settled


def require_same_recipes(comparison: Comparison) -> None:
    """Refuse run folders whose recipe decides on another result than the one wanted here."""
    for contender in comparison.trained:
        for seed in comparison.seeds:
            run = comparison.run(contender.name, seed)
            if contender.name not in comparison.epochs or not (run / "recipe.toml").exists():
                continue
            written = Recipe(**load_recipe(run / "recipe.toml"))
            wanted = comparison.recipe_of(contender.name, seed)
            different = [
                f"{field.name}={getattr(written, field.name)!r} instead of {getattr(wanted, field.name)!r}"
                for field in dataclasses.fields(Recipe)
                if field.name not in FREE_TO_CHANGE and getattr(written, field.name) != getattr(wanted, field.name)
            ]
            if different:
                raise InputError(
                    f"{run} is a run folder of another recipe ({', '.join(different[:3])}); "
                    "put the options back, or give another --out"
                )


def run_all(comparison: Comparison, lock: int, console: Console, after_run: Callable[[Path], object]) -> dict[str, Any]:
    """Train what is not trained, then average what is to be averaged; `comparison.json` is written after every run."""
    failures = {(name, seed): why for name, why in comparison.untrainable.items() for seed in comparison.seeds}
    todo = [
        (contender.name, seed)  # all models with one seed first, so that a table begins early
        for seed in comparison.seeds
        for contender in comparison.trained
        if contender.name in comparison.epochs and not is_finished(comparison, contender, seed)
    ]
    display = Display(console, comparison, todo)

    def write() -> dict[str, Any]:
        result = summarise(comparison, failures)
        write_json(comparison.out / "comparison.json", result)
        after_run(comparison.out)
        return result

    def ended(job: Job, fault: str) -> None:
        if fault:
            failures[job.key] = fault
        result = write()
        display.show_run(*job.key, f"failed: {fault}" if fault else outcome_of(result, *job.key))

    write()
    with display.show():
        jobs = [job_of(comparison, name, seed) for name, seed in todo]
        run_jobs(jobs, comparison.jobs, comparison.threads, lock, ended, display.tick)
    for seed in comparison.seeds:
        for contender in comparison.means:
            average(comparison, contender, seed, failures)
    return write()


def job_of(comparison: Comparison, name: str, seed: int) -> Job:
    """What trains one run, or goes on with it, and evaluates it."""
    run = comparison.run(name, seed)
    train: tuple[str, ...] = ("train", "--resume", str(run))
    if not (run / "recipe.toml").exists():
        shared = ("--recipe", str(comparison.out / "recipe.toml"))
        own = ("--model", name, "--seed", str(seed), "--epochs", str(comparison.epochs[name]))
        train = ("train", *shared, *own, "--out", str(run))
    log = comparison.out / "logs" / f"{slug(name)}-seed{seed}.txt"
    return Job((name, seed), (train, ("evaluate", str(run))), log)


def average(comparison: Comparison, contender: Contender, seed: int, failures: dict[tuple[str, int], str]) -> None:
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


def outcome_of(result: dict[str, Any], name: str, seed: int) -> str:
    """What a finished run reached, in words."""
    row = next(row for row in result["models"] if row["name"] == name)
    run = next(run for run in row["runs"] if run["seed"] == seed)
    return f"top-1 {run['top1']:.2%} in {run['minutes']:.2f} minutes"
