"""The verbs that look inside, `analyze` and `explain`; like the others they import what they need when called."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from tokenfusion.errors import InputError
from tokenfusion.formatting import counting, counting_tasks
from tokenfusion.imports import first_import
from tokenfusion.places import require_data, require_run, require_sources
from tokenfusion.terminal import AsJson, show
from tokenfusion_runtime.output import json_text, spelled_out

app = App(
    name="analyze",
    help="Measure what goes on inside a model: how its attention behaves, which tokens decide.\n\n"
    "Example: tokenfusion analyze tokens runs/photos",
)
RunOrModel = Annotated[
    str,
    Parameter(
        name="RUN_OR_MODEL",
        help="Folder that `train` wrote, or a model's name, which is looked at with random weights.",
    ),
]
Data = Annotated[str | None, Parameter(help="Labelled images; a run's own held-out images when not given.")]
NumImages = Annotated[int, Parameter(help="How many images to look at, spread evenly over the data.")]


@app.command
def collapse(
    run_or_model: RunOrModel,
    data: Data = None,
    /,
    *,
    num_images: NumImages = 256,
    out: Path | None = None,
    as_json: AsJson = False,
) -> None:
    """Measure whether attention collapses: how alike the blocks' maps, a block's heads and the tokens are.

    Writes collapse.json and figures as PNG and SVG.

    Example: tokenfusion analyze collapse runs/photos

    Parameters
    ----------
    out
        Folder to write to; RUN/collapse, or collapse for a model's name, when not given.
    as_json
        Print collapse.json instead of a summary.
    """
    require_run_or_model(run_or_model)
    require_data(data or "digits")
    with first_import("timm"):
        from tokenfusion.analyze.collapse import analyze_collapse

    with counting_tasks() as progress:
        result, folder = analyze_collapse(run_or_model, data, num_images=num_images, out=out, progress=progress)
    lines = [f"{result['images']:,} images. {result['summary']}", where_written(folder / "collapse.json", result)]
    show(result, as_json, lines=lines)


@app.command
def tokens(
    run_or_model: RunOrModel,
    data: Data = None,
    /,
    *,
    num_images: NumImages = 256,
    out: Path | None = None,
    as_json: AsJson = False,
) -> None:
    """Measure which tokens decide: pixels of the CNN or patches, or a CrossViT's small or large patches.

    What CLS attends to, where its content comes from (attention rollout), and what is lost when the tokens of a layer
    are replaced by their mean over images and places. Writes tokens.json and a figure as PNG and SVG.

    Example: tokenfusion analyze tokens runs/photos

    Parameters
    ----------
    out
        Folder to write to; RUN/tokens, or tokens for a model's name, when not given.
    as_json
        Print tokens.json instead of a table.
    """
    require_run_or_model(run_or_model)
    require_data(data or "digits")
    with first_import("timm"):
        from tokenfusion.analyze.tokens import analyze_tokens, table_of

    with counting_tasks() as progress:
        result, folder = analyze_tokens(run_or_model, data, num_images=num_images, out=out, progress=progress)
    lines = [result["summary"], where_written(folder / "tokens.json", result)]
    show(result, as_json, table_of(result), lines)


def explain(
    run: Path,
    /,
    *images: Annotated[str, Parameter(name="IMAGE")],
    method: Literal["gradcam", "rollout", "attention"] = "gradcam",
    branch: Literal["cnn", "transformer", "both"] = "both",
    of_class: Annotated[str, Parameter(name="--class")] = "",
    topk: int = 1,
    faithfulness: int = 0,
    out: Path | None = None,
    as_json: AsJson = False,
) -> None:
    """Draw what a run looks at over images, branch by branch; without images, over its worst mistakes for the report.

    Exits with 1 if any image could not be read; the others are explained all the same.

    Example: tokenfusion explain runs/photos new/*.jpg --method rollout

    Parameters
    ----------
    run
        Folder that `train` wrote.
    images
        Files, folders, globs, or - for a list on standard input; the evaluation's worst mistakes when not given, or
        without mistakes the right answers that are least sure.
    method
        Grad-CAM, attention rollout, or what CLS attends to in the last layer.
    branch
        The branch whose tokens or map are looked at; both where there are two.
    of_class
        Name of the class to explain; the predicted one when not given.
    topk
        How many of the likeliest classes to explain.
    faithfulness
        How many held-out images to measure deletion and insertion curves on.
    out
        Folder to write to; RUN/explain, or RUN/explain/mistakes of the worst mistakes, when not given.
    as_json
        Print explain.json instead of a summary.
    """
    require_run(run)
    if images:
        require_sources(images)
    with first_import("timm"):
        from tokenfusion.analyze import explain as room

    question = room.Question(method, branch, of_class, topk)
    with counting_tasks() as progress:
        result, folder = room.explain(run, images, question, out=out, faithfulness=faithfulness, progress=progress)
    failed = [image for image in result["images"] if "error" in image]
    for image in failed:
        print(spelled_out(f"{image['path']}: {image['error']}"), file=sys.stderr)
    if as_json:
        print(json_text(result, indent=2))
    else:
        for line in room.faithfulness_summary(result["faithfulness"] or {}):
            print(line)
        if result["chosen"] == "least sure":
            print("the evaluation found no mistake to explain; these are the right answers that it was least sure of")
        pictures = sum(len(image.get("overlays", ())) for image in result["images"])
        print(f"{pictures} overlays of {len(result['images']) - len(failed)} images, and explain.json, are in {folder}")
    if failed:
        sys.exit(1)


def similar(
    run: Path,
    images: Annotated[list[str], Parameter(name="IMAGE")],
    /,
    *,
    topk: int = 5,
    as_json: AsJson = False,
) -> None:
    """Show the training images that are nearest to an image, by what the run's pretrained parents see.

    Example: tokenfusion similar runs/photos new/cat.jpg

    Parameters
    ----------
    run
        Folder that `train` wrote, of a model fuse(CNN,VIT,probe).
    images
        Image files, or folders of them.
    topk
        How many training images to show of each.
    as_json
        Print JSON instead of a table.
    """
    require_run(run)
    require_sources(images)
    with first_import("timm"):
        from tokenfusion.similar import LIKENESS
        from tokenfusion.similar import similar as find_similar
    from tokenfusion_runtime.files import expand

    if topk < 1:
        raise InputError(f"--topk {topk} shows no image; give 1 or more")
    images = [str(image) for image in expand(images)]
    with counting("parents look at training images") as progress:
        found = find_similar(run, images, topk, progress)
    pairs = [(image, other) for image, nearest in zip(images, found, strict=True) for other in nearest]
    rows = [{"image": image} | asdict(other) for image, other in pairs]
    table = [["image", "training image", "label", "likeness"]]
    table += [[image, other.path, other.label, f"{other.likeness:.3f}"] for image, other in pairs]
    show(rows, as_json, table, [LIKENESS])


def require_run_or_model(run_or_model: str) -> None:
    """Refuse what looks like a path, as models' names do not, and is no run.

    Raises:
        InputError: it is none.
    """
    if Path(run_or_model).exists() or ("/" in run_or_model and "(" not in run_or_model):
        require_run(Path(run_or_model))


def where_written(file: Path, result: dict[str, Any]) -> str:
    """Where a result and its figures are."""
    return f"written to {file}, with {', '.join(result['figures'])}"
