"""The verb `check`; like the others it imports what it needs when it is called."""

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tokenfusion.errors import InputError
from tokenfusion.imports import first_import
from tokenfusion.places import require_data, require_files
from tokenfusion.preset import PRETRAINED_PAIR
from tokenfusion.recipe import HUB, Reading, Recipe
from tokenfusion.terminal import stderr
from tokenfusion_runtime.output import json_text


def check(
    data: str,
    /,
    *,
    out: Path | None = None,
    img_size: tuple[int, ...] = (224,),
    pretrained: tuple[str, ...] = (),
    model: str = "",
    reading: Annotated[Reading, Parameter(name="*")] = Reading(),  # noqa: B008 - frozen
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Check labelled images before training on them; writes check.html, check.json and quarantine.csv.

    Finds images that are unreadable, tiny, huge, animated or oddly coloured; exact and near duplicates, within and
    between splits; classes that are empty, rare or differ between splits; labels that are likely wrong, ranked; and
    what the crop cuts off. Nothing in DATA is changed. The exit status is 0 whatever is found; `train --exclude
    quarantine.csv` leaves out what had better be left out.

    Example: tokenfusion check photos/

    Parameters
    ----------
    data
        Images as `train` takes them.
    out
        Folder to write to, outside DATA; check-NAME here when not given.
    img_size
        Height and width that images will be resized to, or one number for both: what the crop cuts off depends on it.
    pretrained
        Judge labels by what pretrained parents see instead of thumbnails: hub, or the CNN's and the transformer's file.
        What they see is kept, and `train --pretrained` of the same images begins with it.
    model
        With --pretrained, the model fuse(CNN,VIT,probe) whose parents they are; when not given, the pair that `train
        --pretrained` takes.
    as_json
        Print check.json instead of a summary.
    """
    require_data(data)
    require_files(tuple(name for name in pretrained if name != HUB), "--pretrained")
    if model and not pretrained:
        raise InputError(f"--model {model} is whose parents judge labels; give their weights by --pretrained with it")
    with first_import("timm"):
        from tokenfusion.check.checkup import check_data, free_run
        from tokenfusion.check.report import summarise
        from tokenfusion.check.seen import fetch_parents
    from tokenfusion.formatting import counted
    from tokenfusion_runtime.output import spelled_out

    start = Recipe(img_size=img_size, pretrained=pretrained, model=model or PRETRAINED_PAIR)
    height, width = start.img_size
    if pretrained:
        fetch_parents(start, stderr.print)
    with show_progress() as progress:
        result, folder = check_data(data, out, (height, width), progress, reading, start)
    if as_json:
        print(json_text(result, indent=2))
        return
    for line in summarise(result):
        print(spelled_out(line, layout=True))
    seen = [*(["--model", model] if model else []), *(["--pretrained", *pretrained] if pretrained else [])]
    options = [*seen, "--exclude", str(folder / "quarantine.csv"), "--out", str(free_run(data))]
    command = f"; tokenfusion train {shlex.join([data, *options])}"
    trains = result["quarantined"] and not result["train_refuses"]
    print(f"{counted(result['quarantined'], 'image')} had better be left out{command * bool(trains)}")
    if trains and not pretrained:
        print("add --pretrained hub to that: `train` then starts from pretrained weights, best where images are few")
    print(f"open {folder / 'check.html'}")


@contextmanager
def show_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a stage on a terminal, a line every ten seconds elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    from tokenfusion.formatting import bars

    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    said = time.monotonic()
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with bars(errors, *columns) as show_bar:

        def show(stage: str, done: int, total: int) -> None:
            nonlocal said
            show_bar(stage, done, total)
            if not errors.is_terminal and time.monotonic() - said > 10:
                said = time.monotonic()
                errors.print(f"{stage}: {done:,} of {total:,}")

        yield show
