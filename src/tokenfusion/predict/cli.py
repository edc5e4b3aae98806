"""The verb `predict`; like the others it imports what it needs when it is called."""

import io
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from tokenfusion.errors import InputError
from tokenfusion.formatting import Show
from tokenfusion.imports import first_import, import_timm_alone
from tokenfusion.places import require_run, require_sources
from tokenfusion.recipe import Reading
from tokenfusion.terminal import AsJson, end_stopped
from tokenfusion.terminal import show as show_table
from tokenfusion_runtime.prediction import Prediction

Flag = Parameter(negative="")


def predict(
    run: Path,
    sources: Annotated[list[str], Parameter(name="SOURCE", allow_leading_hyphen=True)],
    /,
    *,
    topk: int = 5,
    output: Annotated[Literal["table", "json", "csv"], Parameter(name="--format")] = "table",
    as_json: AsJson = False,
    explain_by_example: Annotated[bool, Flag] = False,
    raw: Annotated[bool, Flag] = False,
    abstain: float | None = None,
    out: Path | None = None,
    embeddings: Annotated[bool, Flag] = False,
    compile: Annotated[bool, Flag] = False,
    batch_size: int | None = None,
    workers: int | None = None,
    images_per_part: int | None = None,
    root: str | None = None,
    encoding: str | None = None,
    path_column: str | None = None,
    image_column: str | None = None,
) -> None:
    """Classify images. A score says how often such an answer is right: it is calibrated on held-out images.

    It exits with 1 if any image could not be read, with --out if none could; the others are classified all the same.

    Example: tokenfusion predict runs/photos new/*.jpg --json

    Parameters
    ----------
    run
        Folder that `train` wrote, or hf://ORG/NAME@REVISION of a hub.
    sources
        Files, folders, globs, or - for a list on standard input, a path a line; with --out also lists, Parquet files,
        tars, and shards by pattern or URL.
    topk
        How many classes to name.
    output
        A table to read, JSON lines (an object for each image, a line each), or CSV: path, label, score, label_2,
        score_2 ..., error.
    as_json
        The same as --format json: JSON lines.
    explain_by_example
        Show the training images that are nearest to each image too, of a run of pretrained parents (see `similar`).
    raw
        Give the model's scores as they are, without the temperature that calibrates them.
    abstain
        Largest share of wrong answers, such as 0.1: where the model is too unsure for that, the label is null. It needs
        at least 29 held-out images for 0.1, 59 for 0.05, 149 for 0.02.
    out
        Folder for a Parquet file a shard and _manifest.json, in place of printing; what is there is gone on with.
    embeddings
        With --out, add the vector that the head reads.
    compile
        With --out, compile the model first (torch.compile), which takes up to minutes; needs a C++ compiler.
    batch_size
        With --out, images in the model at once; 64 when not given.
    workers
        With --out, threads that decode; one a core when not given.
    images_per_part
        With --out, images of a Parquet file where they lie in no shard; 10000 when not given.
    root
        With --out, folder that the paths in a list start at; the list's own when not given.
    encoding
        With --out, encoding of a list that is in no UTF; guessed when not given.
    path_column
        With --out, column of a list that names the image files, where its name is none of the usual ones.
    image_column
        With --out, column of Parquet that holds the images, where several might.
    """
    for word in sources:
        if word.startswith("--") and not os.path.lexists(word):
            raise InputError(f"{word} is no option of predict, and no file; `tokenfusion predict --help` lists them")
    require_run(run)
    require_sources(sources)
    if as_json and output == "csv":
        raise InputError("--json and --format csv contradict each other; give one of them")
    output = "json" if as_json else output
    if explain_by_example and (out is not None or output == "csv"):
        raise InputError("--explain-by-example is printed as a table or as JSON; leave out --out and --format csv")
    if raw and abstain is not None:
        raise InputError("--abstain goes by calibrated scores; leave out --raw")
    reading: dict[str, Any] = {
        "root": root,
        "encoding": encoding,
        "path_column": path_column,
        "image_column": image_column,
    }
    counts: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "images_per_part": images_per_part}
    if out is None:
        flags = {"embeddings": embeddings, "compile": compile}
        given = [name for name, value in {**flags, **counts, **reading}.items() if value]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} is for many images; give --out DIR too")
        print_images(run, sources, topk, output, raw, abstain, explain_by_example)
        return
    if output != "table":
        raise InputError(f"--format {output} is printed, and --out writes Parquet; give one of them")
    options = {name: value for name, value in counts.items() if value is not None}
    options |= {"topk": topk, "abstain": abstain, "raw": raw, "embeddings": embeddings, "compile": compile}
    options["reading"] = Reading(**{name: value for name, value in reading.items() if value is not None})
    write_predictions(run, sources, out, options)


def write_predictions(run: Path, sources: list[str], out: Path, options: dict[str, Any]) -> None:
    """Write what a run says of images into a folder; exits with 1 if none could be read, with 130 after Ctrl-C."""
    from rich.console import Console

    from tokenfusion.formatting import bars, counted

    with first_import("timm"):
        from tokenfusion.predict.many import predict_many

    try:
        with bars(Console(stderr=True)) as show:

            def progress(done: int, parts: int, images: int) -> None:
                show("parts", done, parts, f"{images:,} images")

            found = predict_many(run, sources, out, progress=progress, say=partial(print, file=sys.stderr), **options)
    except KeyboardInterrupt:
        end_stopped("stopped; the same command goes on")
    errors = f", of which {found['errors']:,} could not be read" * bool(found["errors"])
    errors += f", {found['damaged']:,} with damaged data read as far as it goes (column damage)" * bool(
        found["damaged"]
    )
    print(f"{counted(found['images'], 'image')}{errors}, in {counted(len(found['parts']), 'part')} in {out}")
    if found["waiting"]:
        print(f"left to other processes: {counted(found['waiting'], 'part')}")
    if found["images"] and found["errors"] == found["images"]:
        print(f"no image could be read; the column error in {out} says why", file=sys.stderr)
        sys.exit(1)


def print_images(
    run: Path, paths: list[str], topk: int, output: str, raw: bool, abstain: float | None, by_example: bool
) -> None:
    """Print what a run says of images; exits with 1 if any could not be read."""
    from rich.console import Console

    from tokenfusion.data.kinds import Kind, kind_of
    from tokenfusion.formatting import bars
    from tokenfusion_runtime.abstain import why_silent, why_unsure
    from tokenfusion_runtime.files import expand
    from tokenfusion_runtime.output import first_widths, noting_unsure, print_predictions, spelled_out

    with first_import("timm"):
        import_timm_alone()
        from tokenfusion.classifier import Classifier
        from tokenfusion.data.decode import damaged_in_words

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may be any bytes
    classifier = Classifier.load(run).packed()
    classifier = classifier.uncalibrated() if raw else classifier
    topk = min(topk, len(classifier.classes))
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    images = expand(paths) if "-" in paths else list(expand(paths))
    above = sys.stdout.isatty()  # rows that go to the same terminal are printed above the bar
    with bars(errors, redirect_stdout=above) as show:
        damaged: dict[str, str] = {}
        found = classifier.iter_predictions(images, topk=topk, abstain=abstain, on_damage=damaged.setdefault)
        if silent := "" if abstain is None else why_silent(abstain, classifier.surest_errors):
            print(f"nothing is answered: {silent}", file=sys.stderr)
        unsure = list[str]()
        found = noting_unsure(found, unsure)
        predictions = counted_off(found, len(images), show) if isinstance(images, list) else found
        if by_example:
            failed = print_examples(run, list(predictions), output, topk)
        else:
            several = classifier.multi_label
            widths = first_widths(images, classifier.classes, several)
            failed = print_predictions(predictions, output, topk=topk, multi_label=several, widths=widths)
    if abstain is not None and (reason := why_unsure(len(unsure), abstain, classifier.surest_errors)):
        print(reason, file=sys.stderr)
    if damaged:
        print(spelled_out(damaged_in_words(damaged)), file=sys.stderr)
    if failed:
        print(f"{failed} of the images could not be read", file=sys.stderr)
        held = next((path for path in paths if kind_of(path) in (Kind.LIST, Kind.PARQUET, Kind.TAR)), "")
        if held:
            print(f"{held} is no image; to predict the images that it names or holds, give --out DIR", file=sys.stderr)
        sys.exit(1)


def counted_off(predictions: Iterable[Prediction], total: int, show: Show) -> Iterator[Prediction]:
    """Predictions as they come, each told to a bar."""
    for done, prediction in enumerate(predictions, start=1):
        yield prediction
        show("images", done, total)


def print_examples(run: Path, predictions: list[Prediction], output: str, topk: int) -> int:
    """Print predictions, each with the training images that are nearest to it, as `similar` finds them.

    Returns:
        how many images could not be read.
    """
    from tokenfusion.similar import KEPT, LIKENESS, similar
    from tokenfusion_runtime.output import json_text, print_predictions

    read = [prediction.path for prediction in predictions if not prediction.error]
    nearest = dict(zip(read, similar(run, read, KEPT), strict=True)) if read else {}
    if output == "json":
        for prediction in predictions:
            examples = [asdict(other) for other in nearest.get(prediction.path, [])]
            print(json_text(prediction.to_dict() | ({} if prediction.error else {"examples": examples})))
        return len(predictions) - len(read)
    failed = print_predictions(predictions, output, topk=topk)
    table = [["image", "nearest training image", "label", "likeness"]]
    table += [[path, each.path, each.label, f"{each.likeness:.3f}"] for path in read for each in nearest[path]]
    show_table(None, False, table, [LIKENESS])
    return failed
