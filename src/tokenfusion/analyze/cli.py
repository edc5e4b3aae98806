"""The verbs of `tokenfusion analyze`; like the others they import what they need when they are called."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

app = App(name="analyze", help="Look inside a model.")


@app.command
def collapse(
    subject: Annotated[str, Parameter(name="RUN_OR_MODEL")],
    data: str | None = None,
    /,
    *,
    num_images: int = 256,
    out: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Measure whether attention collapses: how alike the blocks' maps, a block's heads and the tokens are.

    Writes collapse.json and figures as PNG and SVG.

    Example: tokenfusion analyze collapse runs/photos

    Parameters
    ----------
    subject
        Folder that `train` wrote, or a model's name, which is looked at with random weights.
    data
        Labelled images; a run's own held-out images when not given.
    num_images
        How many images to look at, spread evenly over the data.
    out
        Folder to write to; RUN/collapse, or collapse for a model's name, when not given.
    as_json
        Print collapse.json instead of a summary.
    """
    from rich.console import Console
    from rich.progress import Progress

    from tokenfusion.analyze.collapse import analyze_collapse

    errors = Console(stderr=True)
    with Progress(console=errors, disable=not errors.is_terminal, transient=True) as bar:
        task = bar.add_task("reading images", total=None)
        result, folder = analyze_collapse(
            subject,
            data,
            num_images=num_images,
            out=out,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    print(f"{result['images']:,} images. {result['summary']}")
    print(f"written to {folder / 'collapse.json'}, with {', '.join(result['figures'])}")
