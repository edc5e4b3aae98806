"""The command `tokenfusion`: typed verbs that import what they need when they are called."""

import os
import shlex
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from tokenfusion import options
from tokenfusion.analyze.cli import app as analyze
from tokenfusion.analyze.cli import explain, similar
from tokenfusion.check.cli import check
from tokenfusion.errors import InputError
from tokenfusion.export.cli import export
from tokenfusion.formatting import abridged
from tokenfusion.imports import first_import
from tokenfusion.places import require_data, resume_command
from tokenfusion.predict.cli import predict
from tokenfusion.recipe import Recipe
from tokenfusion.run_verbs import evaluate, push, report
from tokenfusion.serve.cli import serve
from tokenfusion.terminal import AsJson, console, end_stopped, show, stderr
from tokenfusion.version import __version__

app = App(
    name="tokenfusion",
    version=__version__,
    help="Train, compare, explain and ship image classifiers that fuse CNN and transformer tokens.\n\n"
    "Your photographs: tokenfusion train photos/ --pretrained hub --out runs/photos\n\n"
    "Try it: tokenfusion train digits --model tokenfusion_early_micro --out runs/digits",
    error_formatter=options.explain_error,
    default_parameter=Parameter(consume_multiple=True, negative_iterable="", show_default=options.shown_default),
    config=(
        options.refuse_nothing,
        options.refuse_words,
        options.refuse_fractions,
        options.with_recipe,
        options.require_all,
    ),
    result_action="return_value",
)


@app.command(help_formatter=options.HelpWithAutos())
def train(
    settings: Annotated[Recipe, Parameter(name="*")] = Recipe(),  # noqa: B008 - frozen
    *,
    out: Path | None = None,
    recipe: Path | None = None,  # noqa: ARG001 - read by with_recipe
    resume: Path | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model on labelled images.

    Example: tokenfusion train photos/ --pretrained hub --out runs/photos

    That is best for a folder of photographs: it starts from pretrained weights, chooses the rest, and needs no other
    option; with --dry-run it says how long that would take. From random weights, for many images:

    Example: tokenfusion train photos/ --model tokenfusion_early_tiny --img-size 128 --out runs/photos

    An option wins over the recipe file, and the file over the preset of model and data; the defaults shown come last.

    Parameters
    ----------
    out
        Folder to write the run to.
    recipe
        TOML file with any of these options; `data` and `model` may be among them.
    resume
        Run folder to go on with, as if it had never stopped; where its images have moved, give DATA (and --root).
    dry_run
        Print steps, memory, time and checkpoint size from a few measured steps, and write nothing; --out is not needed.
    as_json
        With --dry-run, print JSON.
    """
    if as_json and not dry_run:
        raise InputError("--json prints a plan; give --dry-run with it, or leave it out")
    options.require_trainable(settings, out, resume)
    if settings.pretrained and not as_json and os.environ.get("RANK", "0") == "0":
        console.print(f"{settings.model}, from pretrained weights; loading PyTorch takes some seconds")
    with first_import("timm"):
        from tokenfusion import training
        from tokenfusion.analyze.collapse import watch_collapse
        from tokenfusion.training.saved import CHECKPOINT, is_saved

    if dry_run and not resume:
        from tokenfusion.training.auto.dry_run import print_plan

        print_plan(settings, as_json, console.print, stderr.print)
        return
    run = resume or out
    assert run is not None
    console.outlives_reader = True
    try:
        if resume:
            training.resume(run, console, watch_collapse, data=settings.data, root=settings.root)
        else:
            training.start(settings, run, console, watch_collapse)
    except training.Interrupted:
        end_stopped(f"stopped and saved; go on with `{resume_command(run)}`")
    except KeyboardInterrupt:
        where = "at the last" if is_saved(run / CHECKPOINT) else "before the first"
        end_stopped(f"stopped {where} checkpoint; go on with `{resume_command(run)}`")
    console.print(f"the model is in {run}; next: tokenfusion evaluate {shlex.quote(str(run))}")


@app.command
def compare(
    settings: Annotated[Recipe, Parameter(name="*")] = Recipe(),  # noqa: B008 - frozen
    *,
    models: list[str],
    out: Path,
    seeds: int = 3,
    budget: str = "",
    controls: Annotated[bool, Parameter(negative="")] = False,
    jobs: int = 1,
    recipe: Path | None = None,  # noqa: ARG001 - read by with_recipe
    as_json: AsJson = False,
) -> None:
    """Train several models under one recipe and budget, with several seeds; writes OUT/comparison.json and a report.

    Each run is a run folder in OUT/runs. The same command goes on with a comparison that was interrupted. If a run
    fails, the others go on, and the exit status is 1.

    Example: tokenfusion compare photos/ --models tokenfusion_early_tiny,resnet18 --controls --out runs/compare

    Parameters
    ----------
    models
        Names separated by commas or spaces; mean(A,B) averages the predictions of two. Tests compare with the first.
    out
        Folder to write to.
    seeds
        Runs of each model, with the seeds --seed, --seed + 1 and so on.
    budget
        Of each run: epochs=10, minutes=15 of training steps, or macs=1e15 in forward passes; --epochs when not given.
    controls
        Add the parents of fused models, as they are and widened to the same cost, and the mean of their predictions.
    jobs
        Runs at once; they share the cores.
    recipe
        TOML file with any of the options of `train`.
    as_json
        Print comparison.json instead of a table.
    """
    require_data(settings.data)
    with first_import("timm"):
        from tokenfusion.compare import Budget, split_names
        from tokenfusion.compare import compare as compare_models
        from tokenfusion.compare.table import comparison_table, notes
        from tokenfusion.report import write_comparison

    console.outlives_reader = True
    try:
        result = compare_models(
            settings,
            split_names(models),
            seeds,
            out,
            budget=Budget.parse(budget) if budget else None,
            controls=controls,
            jobs=jobs,
            console=stderr if as_json else console,
            after_run=write_comparison,
        )
    except KeyboardInterrupt:
        end_stopped("stopped and saved; the same command goes on")
    written = f"written to {out / 'comparison.json'}; open {out / 'report.html'}"
    show(result, as_json, comparison_table(result), [*notes(result), written])
    if any(row["failed"] for row in result["models"]):
        sys.exit(1)


@app.command
def models(pattern: str = "*", /, *, timm: str = "", as_json: AsJson = False) -> None:
    """List this package's models: parameters, multiply-adds and input size; or the names of timm's.

    Example: tokenfusion models "cmt_*"

    Parameters
    ----------
    pattern
        Shell pattern that names must match.
    timm
        Shell pattern, such as "resnet5*": list timm's models instead, and which pretrained weights each has.
    as_json
        Print a JSON list.
    """
    with first_import("timm"):
        from tokenfusion.models.cost import describe_models
        from tokenfusion.models.create import list_timm

    if timm:
        found = list_timm(timm)
        if not found:
            raise InputError(f'no model of timm matches {timm!r}; give a pattern such as "*resnet*"')
        show(
            found, as_json, [["model", "pretrained weights"], *([row["name"], " ".join(row["tags"])] for row in found)]
        )
        return
    rows = describe_models(pattern)
    if not rows:
        raise InputError(
            f"no model of this package matches {pattern!r}; `tokenfusion models` lists all of them, and "
            f"`tokenfusion models --timm {shlex.quote(pattern)}` those of timm, which train as well"
        )
    table = [["model", "parameters M", "GMACs", "input"]]
    for row in rows:
        height, width = row["img_size"]
        table.append([row["name"], f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.3f}", f"{height}×{width}"])
    show(rows, as_json, table)


@app.command
def profile(
    patterns: Annotated[list[str], Parameter(name="MODEL")],
    /,
    *,
    img_size: tuple[int, ...] = (),
    batch_size: int = 8,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    paper: Annotated[bool, Parameter(negative="")] = False,
    as_json: AsJson = False,
) -> None:
    """Count and measure what models cost: parameters, multiply-adds, activations; memory and speed of inference.

    Each model is measured in a fresh process. Activations are the elements of the outputs of convolutions and matrix
    products. Peak memory is the GPU's tensors or, on a CPU, what the process grew by: weights, activations, buffers.

    Example: tokenfusion profile "cmt_*" --batch-size 1

    Parameters
    ----------
    patterns
        Names, or shell patterns such as "cmt_*".
    img_size
        Height and width of the images, or one number for both; each model's own when not given.
    batch_size
        Images of a forward pass.
    precision
        Arithmetic of the matrix products; auto takes bf16 where the hardware has it.
    paper
        Put the published figures beside the counts instead, and mark what differs by more than 2 %.
    as_json
        Print raw numbers as JSON.
    """
    from rich.progress import track

    with first_import("timm"):
        from tokenfusion.profile import profile_models, profile_papers, select_models

    if paper and img_size:
        raise InputError("--paper compares at the published image size; leave out --img-size")
    names = select_models(patterns)
    if paper:
        result, table, notes = profile_papers(names)
    else:
        bar = partial(track, console=stderr, disable=not stderr.is_terminal, transient=True)
        size = Recipe(img_size=img_size).img_size
        result, table, notes = profile_models(names, (size[0], size[1]) if size else None, batch_size, precision, bar)
    show(result, as_json, table, notes)


app.command(evaluate)
app.command(push)
app.command(report)
app.command(predict)
app.command(export)
app.command(serve)
app.command(similar)
app.command(analyze)
app.command(explain)
app.command(check)


def main() -> None:
    """Run the command; a user's mistake is a message and exit status 2, not a traceback."""
    try:
        app(options.data_first(sys.argv[1:]))
        sys.stdout.flush()
    except InputError as error:
        stderr.print(f"error: {abridged(str(error), 20_000)}")
        sys.exit(2)
    except OSError as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush
        if not isinstance(error, BrokenPipeError):  # the reader, such as `head`, has enough
            stderr.print(f"error: {error}")
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        from tokenfusion.hardware import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        stderr.print(
            f"error: out of memory ({reason}); give a smaller --batch-size or --img-size, or more --accumulate"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        end_stopped("stopped")


if __name__ == "__main__":
    main()
