"""A run becomes a folder: checked beforehand, written under another name, gated, and only then called by its own."""

import contextlib
import glob
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tokenfusion.checkpoint import load_description
from tokenfusion.classifier import Classifier
from tokenfusion.errors import InputError, how_to_install
from tokenfusion.evaluate import mistaken_of
from tokenfusion.export.gate import LIMITS, faults, held_out_images, measure, parity_lines
from tokenfusion.export.inside import write_inside
from tokenfusion.files import lock, make_folder, refuse_inside, write_json, write_text
from tokenfusion.formatting import Progress, unheard
from tokenfusion.hardware import hardware_name
from tokenfusion.judged import open_judged
from tokenfusion.recipe import Recipe, load_recipe
from tokenfusion.version import __version__
from tokenfusion_runtime import classifier as runtime
from tokenfusion_runtime.description import FORMAT, hash_of, read_description, require_same, require_whole

PRECISIONS = {"onnx": ("fp32", "int8"), "openvino": ("fp32", "fp16", "bf16", "int8"), "pt2": ("fp32",)}
"""What each format has; the CPU's ONNX Runtime computes neither fp16 nor bf16."""
MOST_BATCH = 4096
CPU = torch.device("cpu")
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "pt2": ()}


def export(
    run: Path,
    out: Path,
    *,
    format: str = "onnx",
    precision: str = "fp32",
    batch: int | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress = unheard,
) -> dict[str, Any]:
    """Export a finished run into a folder that answers alike.

    Args:
        run: a finished run folder.
        out: the folder to write; it must not exist.
        format: "onnx", "openvino" or "pt2".
        precision: "fp32", "fp16", "bf16" or "int8", as far as the format has it.
        batch: images of a call; None for any number.
        force: keep the folder though it answers otherwise, and mark it so.
        say: told what the gate finds.
        progress: told of the images that it judges.

    Returns:
        What the folder's `model.json` holds.

    Raises:
        InputError: the run or the format cannot be used, or the artefact answers otherwise than the run.
    """
    require_possible(format, precision, batch)
    classifier = Classifier.load(run, CPU)  # whose float32 is float32: a GPU rounds convolutions to TF32
    recipe = Recipe(**load_recipe(run / "recipe.toml"))
    refuse_inside(out, recipe.data)
    with new_folder(out) as folder:
        description = describe(run, format, precision, batch)
        open_judged(run, recipe, None)  # what is not there, and what no engine can do, is said before images are read
        description["files"] = write_graph(classifier, run, folder, description)
        write_description(folder, description)
        artefact = load(folder)
        if artefact.note:
            say(artefact.note)
        images, labels, split = held_out_images(run, classifier)
        parity = measure(classifier, artefact.probabilities, images, labels, progress) | {"split": split}
        parity |= {"hardware": hardware_name(CPU), "engine": engine_of(format), "note": artefact.note}
        errors = parity.pop("surest_errors")
        if precision != "fp32" and description["surest_errors"]:  # by which it abstains: other numbers, other errors
            description["surest_errors"] = errors
        found = faults(parity, precision)
        del parity["furthest"]  # what passes names no image of the data
        for line in parity_lines(parity):
            say(line)
        if found and not force:
            differing = f" (differing images: {', '.join(parity['differing'])})" * bool(parity["differing"])
            raise InputError(
                f"the {format} of {precision} answers otherwise than {run}: {'; '.join(found)}{differing}; nothing was "
                "written: choose another --precision, or keep it with --force"
            )
        description |= {"parity": parity, "forced": bool(found), "faults": found}
        write_inside(folder / description["files"][0], description)
        description = write_description(folder, description)
        load(folder)  # refuses it where file, copy inside and model.json are not alike
        write_text(folder / "README.md", readme(description))
    return description


def require_possible(format: str, precision: str, batch: int | None) -> None:
    """Say before the work starts what cannot be done.

    Raises:
        InputError: the format lacks the precision, a package is missing, or no image is in a batch.
    """
    if precision not in PRECISIONS[format]:
        having = [name for name, precisions in PRECISIONS.items() if precision in precisions]
        raise InputError(
            f"format={format} has no {precision} on a CPU; give --precision {' or '.join(PRECISIONS[format])}, or "
            f"--format {' or '.join(having)}"
        )
    wanted = (*PACKAGES[format], *(("nncf",) if precision == "int8" else ()))
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"format={format} with precision={precision} needs {', '.join(missing)}, not installed; "
            f"{how_to_install('export')}"
        )
    if batch is not None and batch < 1:
        raise InputError(f"batch={batch} has no image; give 1 or more, or dynamic")
    if batch is not None and batch > MOST_BATCH:
        raise InputError(f"batch={batch} are more images than the {MOST_BATCH:,} of a call; give fewer, or dynamic")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, which gets its name when all went well; one process at a time.

    Raises:
        InputError: `out` exists, another process is exporting there, or it cannot be written.
    """
    out = out.resolve()
    make_folder(out.parent)
    try:
        with lock(out.parent / f".{out.name}.lock", out):
            if out.exists():
                raise InputError(f"{out} exists; give another --out, or remove it")
            for left in out.parent.glob(f".{glob.escape(out.name)}.????????.tmp"):  # by one that was killed
                shutil.rmtree(left, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
            try:
                yield folder
                folder.chmod(0o755)
                folder.rename(out)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{out} could not be written: {error}; make room, or name another folder") from error


def describe(run: Path, format: str, precision: str, batch: int | None) -> dict[str, Any]:
    """What `model.json` holds of the classifier; graph and parity are added when they are known."""
    trained = load_description(run)
    kept = ("name", "classes", "preprocess", "max_pixels", "multi_label", "thresholds", "temperature", "surest_errors")
    saved = {key: trained[key] for key in kept}
    weights = hash_of([run / "model.safetensors"])
    return (
        {"export_format": FORMAT, "format": format, "precision": precision, "batch": batch}
        | saved
        | {"mistaken": mistaken_of(run, trained["classes"])}
        | {"weights_sha256": weights, "tokenfusion": __version__, "license": ""}
    )


def write_description(folder: Path, description: dict[str, Any]) -> dict[str, Any]:
    """Write `model.json` with the hash of the graph as it now is, which alone cannot stand inside the graph."""
    whole = description | {"graph_sha256": hash_of([folder / name for name in description["files"]])}
    write_json(folder / "model.json", whole)
    return whole


def write_graph(classifier: Classifier, run: Path, folder: Path, description: dict[str, Any]) -> list[str]:
    """Write the graph in its format; the names of its files."""
    if description["format"] == "pt2":
        from tokenfusion.export.pt2 import save_pt2

        save_pt2(classifier, description["batch"], folder / "model.pt2")
        return ["model.pt2"]
    from tokenfusion.export.onnx import quantized_onnx, to_onnx

    graph = to_onnx(classifier, description["batch"])
    if description["format"] == "onnx":
        import onnx

        if description["precision"] == "int8":
            graph = quantized_onnx(graph, classifier, run, description["batch"])
        onnx.save(graph, folder / "model.onnx")
        return ["model.onnx"]
    from tokenfusion.export.openvino import save_openvino

    save_openvino(graph, classifier, run, folder / "model.xml", description)
    return ["model.xml", "model.bin"]


def load(folder: Path) -> runtime.ExportedClassifier:
    """An exported classifier of any format; `tokenfusion_runtime.load` is what loads those without torch."""
    description = read_description(folder)
    if description["format"] != "pt2":
        return runtime.load(folder)
    from tokenfusion.export.pt2 import pt2_engine

    require_whole(folder, description)
    engine, inside = pt2_engine(folder / "model.pt2")
    require_same(folder, description, inside)
    return runtime.ExportedClassifier(description, engine)


def engine_of(format: str) -> str:
    """What runs a format, and its version: others may choose other ways."""
    package = {"onnx": "onnxruntime", "pt2": "torch"}.get(format, format)
    return f"{package} {version(package)}"


def readme(description: dict[str, Any]) -> str:
    """How the folder is used."""
    parity, forced = description["parity"], description["faults"]
    warning = f"\n**It answers otherwise than its run: {'; '.join(forced)}. It was kept by force.**\n" if forced else ""
    package = "tokenfusion_runtime"
    loads = f"import {package}\nclassifier = {package}.load('.')"
    if description["format"] == "pt2":
        loads = "from pathlib import Path\nfrom tokenfusion.export.artefact import load\nclassifier = load(Path('.'))"
    return f"""# {description["name"]}

{len(description["classes"])} classes, {description["precision"]}, {description["format"]}. Licence: (fill in)
{warning}
```python
{loads}
print(classifier.predict("image.jpg")[0].to_dict())
```

{installation(description["format"])}

On {parity["n"]} held-out images it is right in {parity["accuracy"]:.2%}, the run that it was exported from in
{parity["accuracy_run"]:.2%}; {parity["label_agreement"]:.2%} of the labels are the same, by {parity["engine"]} on
{parity["hardware"]}{f" ({parity['note']})" * bool(parity["note"])}. Scores are calibrated
(temperature {description["temperature"]:.3f}, chosen by the run's scores). The rest is in `model.json`.

The licence is for whoever hands the folder on to say, here and as `license` in `model.json`, which is yours to edit: as
far as the training images allow, and the pretrained weights that the run may have begun with (`began_with` in the
`model.json` of the run).
"""


def installation(format: str) -> str:
    """What to install where the folder is used; neither package is in an index."""
    if format == "pt2":
        return "It needs `tokenfusion`: `pip install .` in a copy of its repository."
    wheel = f"tokenfusion_runtime-{__version__}-py3-none-any.whl"
    return f"""It needs `tokenfusion_runtime` (numpy, Pillow and one engine), which is in no package index, but comes
with `tokenfusion`. In a copy of its repository:

```console
$ pip install './runtime[{format}]'
```

On a machine without one, the file that the first line writes is installed by the second:

```console
$ pip wheel --no-deps --wheel-dir . ./runtime
$ pip install './{wheel}[{format}]'
```"""


__all__ = ["LIMITS", "PACKAGES", "PRECISIONS", "export", "load", "readme"]
