"""The verbs of finished runs: `evaluate`, `report` and `push`; each imports what it needs when it is called."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from tokenfusion.formatting import counted, counting_tasks
from tokenfusion.imports import first_import
from tokenfusion.places import require_data, require_run
from tokenfusion.terminal import AsJson, console, show


def evaluate(
    run: Path,
    data: str | None = None,
    /,
    *,
    split: Literal["train", "val", "test"] | None = None,
    root: str = "",
    encoding: str = "",
    out: Path | None = None,
    with_training_images: Annotated[bool, Parameter(negative="")] = False,
    corruptions: Annotated[bool, Parameter(negative="")] = False,
    compile: Annotated[bool, Parameter(negative="")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a trained run on images it has not seen; writes RUN/evaluation.json, or of other DATA RUN/evaluations/.

    Images that the run was trained on are known by their pixels, wherever they lie, and left out.

    Example: tokenfusion evaluate runs/photos

    Parameters
    ----------
    run
        Folder that `train` wrote.
    data
        Labelled images of the same classes; the run's own held-out images when not given.
    split
        Part of the data; by default val, else test, else everything.
    root
        Folder that the paths in a list start at.
    encoding
        Encoding of a list that is in no UTF; guessed when not given.
    out
        Folder to write to; RUN when not given, or RUN/evaluations/NAME of images that are not the run's held-out ones.
    with_training_images
        Judge images that the run was trained on too.
    corruptions
        Judge the images made worse too: noise, blur, JPEG, contrast, occlusion, shuffled patches, each at three levels.
    compile
        Compile the model first (torch.compile): for many images, as it takes up to minutes; needs a C++ compiler.
    as_json
        Print evaluation.json instead of a summary.
    """
    require_run(run)
    require_data(data or "digits")
    with first_import("timm"):
        from tokenfusion.corruptions import corruption_table
        from tokenfusion.evaluate import evaluate as evaluate_run
        from tokenfusion.evaluate import evaluation_summary, images_in_words, place_of
        from tokenfusion.report import write_figures

    with counting_tasks() as progress:
        result = evaluate_run(
            run,
            data,
            split,
            progress,
            root=root,
            encoding=encoding,
            out=out,
            with_training_images=with_training_images,
            corruptions=corruptions,
            compile=compile,
        )
    place = out or place_of(run, result["data"], result["split"], own=result["own"])
    drawn = write_figures(place)
    skipped = f", {result['skipped']:,} unreadable skipped" * bool(result["skipped"])
    lines = [f"{counted(result['n'], 'image')}: {images_in_words(result)}{skipped}"]
    lines += [f"  skipped {image['path']}: {image['reason']}" for image in result["unreadable"][:5]]
    lines += evaluation_summary(result)
    next_step = f"; next: tokenfusion report {shlex.quote(str(run))}" * (out is None)
    kept = f"; {run / 'evaluation.json'} is as it was, of the run's own held-out images" * (place not in (run, out))
    lines.append(f"written to {place / 'evaluation.json'}, with {', '.join(drawn)}{kept}{next_step}")
    show(result, as_json, corruption_table(result["corruptions"]) if corruptions else (), lines)


def report(run: Path, /) -> None:
    """Write what a run or a comparison reached into RUN/report.html: one file, readable offline.

    Example: tokenfusion report runs/photos

    Parameters
    ----------
    run
        Folder that `train` or `compare` wrote; `evaluate` adds what the report says of mistakes and calibration, and
        `explain` then where the model looked.
    """
    compared = (run / "comparison.json").is_file()
    if not compared:
        require_run(run)
    with first_import("timm"):
        from tokenfusion.report import thumbnails_of, write_comparison, write_report

    console.print(f"open {write_comparison(run) if compared else write_report(run, thumbnails_of(run))}")


def push(
    run: Path,
    repo: Annotated[str, Parameter(name="ORG/NAME")],
    /,
    *,
    send: Annotated[bool, Parameter(negative="")] = False,
    public: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write a run as a folder for a hub, RUN/hub, and say what would be sent; with --send, send it.

    Example: tokenfusion push runs/photos my-org/photos

    Parameters
    ----------
    run
        Folder that `train` wrote; `evaluate` adds what the model card says of accuracy.
    repo
        Where to: an organisation or a user, and a name.
    send
        Send it, which needs a login (`hf auth login`).
    public
        Let anyone read it.
    """
    require_run(run)
    with first_import("timm"):
        from tokenfusion.publish import listing
        from tokenfusion.publish import push as push_run

    files, address = push_run(run, repo, really=send, public=public)
    for line in listing(files, address, repo, public):
        console.print(line)
