"""The verb `export`, which imports what it needs when it is called."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from tokenfusion.errors import InputError
from tokenfusion.formatting import counting_tasks
from tokenfusion.imports import first_import
from tokenfusion.places import require_run
from tokenfusion.terminal import console


def export(
    run: Path,
    /,
    *,
    out: Path,
    format: Annotated[Literal["onnx", "openvino", "pt2"], Parameter(name="--format")] = "onnx",
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32",
    batch: str = "dynamic",
    force: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write a run as a folder that predicts without torch, and is refused unless it answers as the run does.

    Example: tokenfusion export runs/photos --format onnx --out photos-onnx

    Parameters
    ----------
    run
        Folder that `train` wrote.
    out
        Folder to write; it must not exist.
    format
        ONNX, OpenVINO, or PyTorch's own archive.
    precision
        Arithmetic of the artefact, of fp16 its stored weights alone; int8 is calibrated on training images.
    batch
        Images of a call: a number, or dynamic.
    force
        Keep the folder though it answers otherwise than the run; it is marked so.
    """
    require_run(run)
    with first_import("timm"):
        from tokenfusion.export.artefact import export as export_run

    if batch != "dynamic" and not batch.isdecimal():
        raise InputError(f"batch={batch} is no number of images; give one, or dynamic")
    size = None if batch == "dynamic" else int(batch)
    options: dict[str, Any] = {"format": format, "precision": precision, "batch": size, "force": force}
    with counting_tasks() as progress:
        export_run(run, out, **options, say=console.print, progress=progress)
    runs_it = "its README.md says how it is run"  # by torch, and not by the runtime
    if format != "pt2":
        runs_it = f"try: python -m tokenfusion_runtime {shlex.quote(str(out))} IMAGE"
    console.print(f"written to {out}; {runs_it}")
