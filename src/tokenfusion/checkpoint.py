"""Tensors and descriptions on disk: safetensors and JSON, versioned, written whole or not at all, never pickled."""

import json
import math
import shlex
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenfusion.data.decode import ValueRange
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.errors import InputError
from tokenfusion.files import write_atomic
from tokenfusion.hardware import Precision
from tokenfusion.json_files import NUMBER, Shape, fault_in
from tokenfusion.models.official import with_present_names
from tokenfusion.places import require_run

FORMAT = 3  # of the run folder; a reader refuses a newer one, and takes 1 (one class an image) and 2 (raw scores)
DESCRIPTION: dict[str, type] = {
    "name": str,
    "classes": list,
    "preprocess": dict,
    "precision": str,
    "max_pixels": int,
    "parameters": int,
    "macs": int,
    "versions": dict,
    "hardware": str,
    "multi_label": bool,
    "thresholds": list,
    "temperature": float,
    "surest_errors": list,
    "began_with": list,
    "weights": str,
}
"""Fields of `model.json` and their types."""
LISTS: dict[str, Shape] = {
    "surest_errors": [{"images": int, "ranks": [int], "scores": [NUMBER]}],
    "began_with": [{"model": str, "source": str, "sha256": str}],
    "versions": {"*": str},
}
"""What its lists and objects hold."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any] | None = None) -> None:
    """Write tensors, with a JSON description and a checksum in the file's header, whole or not at all."""
    contiguous = contiguous_of(tensors)
    metadata = {"format": "pt", "description": json.dumps(description or {})}  # transformers asks for the format
    metadata["checksum"] = checksum(contiguous)

    def write(temporary: Path) -> None:
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # as any file that this user makes, where safetensors lets nobody else read
            save_file(contiguous, temporary, metadata)
            sort_metadata(temporary)
            temporary.chmod(mode)
        except SafetensorError as error:  # its way to say that the disk is full
            raise OSError(str(error)) from error

    write_atomic(path, write)


def sort_metadata(path: Path) -> None:
    """Order the header's metadata by name: safetensors orders them by chance, and equal tensors make equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)


def load_tensors(path: Path, expected: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Args:
        path: the file.
        expected: the checksum that its tensors must have; "" for the one that stands in the file.

    Raises:
        InputError: the file is missing, cut short, damaged (its checksum tells; older files have none), not the one
            that is expected, or not safetensors (a pickled `.pth` is never opened).
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata() or {}
            description = json.loads(metadata.get("description", "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors: {error}; pickled weights are refused because they can carry code, "
            "and a damaged file must be written anew"
        ) from error
    written = metadata.get("checksum", "")
    found = checksum(tensors) if written or expected else ""
    if written not in ("", found):
        raise InputError(f"{path} is damaged: its tensors are not those that were written; replace it, or train again")
    if expected not in ("", found):
        raise InputError(
            f"{path} holds other weights than the model.json beside it was written with (checksum {found}, not "
            f"{expected}), as where files of two runs were mixed; copy the folder whole"
        )
    return tensors, description


def contiguous_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are written."""
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of contiguous tensors in the order of their names; about 1 GB/s on a core."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def load_weights_exactly(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy tensors into a model that has exactly these names (or had, in older versions), shapes and types, or leave it
    as it was.

    Raises:
        InputError: names, shapes or types differ, and the first differences are listed; or a number is not finite.
    """
    own = model.state_dict()
    tensors = with_present_names(tensors, own)
    differences = [
        *[f"{name} is missing" for name in own if name not in tensors],
        *[f"{name} is unknown" for name in tensors if name not in own],
        *[
            f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ],
        *[
            f"{name} is of {tensors[name].dtype}, not {own[name].dtype}"
            for name in own
            if name in tensors and tensors[name].dtype != own[name].dtype
        ],
    ]
    if differences:
        raise InputError(
            f"{source} does not fit this model: {'; '.join(differences[:3])}; was it written for another model?"
        )
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(f"{source} is damaged: {broken[0]} is not finite; replace it, or train again")
    model.load_state_dict(tensors)


def load_description(run: Path) -> dict[str, Any]:
    """Read a run folder's `model.json`.

    Raises:
        InputError: no such folder, not a run, a run of a newer version, or damaged.
    """
    path = run / "model.json"
    require_run(run)
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}; it is damaged, train again with another --out") from error
    if isinstance(description, dict) and "export_format" in description:
        raise InputError(
            f"{run} is what `tokenfusion export` wrote, which runs without a run: "
            f"`python -m tokenfusion_runtime {shlex.quote(str(run))} IMAGE...`; for other verbs give the run itself"
        )
    version = description.get("format") if isinstance(description, dict) else None
    if not isinstance(version, int):
        raise InputError(f"{path} names no format; it is damaged, train again with another --out")
    if version > FORMAT:
        raise InputError(
            f"{run} is of format {version}, newer than the {FORMAT} that this version reads; update tokenfusion"
        )
    if version < 2:
        description |= {"multi_label": False, "thresholds": []}
    if version < 3:
        description |= {"temperature": 1.0, "surest_errors": []}
    description = {"began_with": [], "weights": ""} | description  # which older runs do not tell
    fault = fault_in_description(description)
    if fault:
        raise InputError(f"{path} {fault}; it is damaged, train again with another --out")
    return description


def value_range_of(run: Path) -> ValueRange | None:
    """What a run takes for black and white in images of more than 8 bits; None where its images had none.

    Raises:
        InputError: not a run, or damaged; see `load_description`.
    """
    return Preprocess.from_dict(load_description(run)["preprocess"]).value_range


def fault_in_description(description: dict[str, Any]) -> str:
    """What is wrong with a description of this version; "" where nothing is."""
    missing = [key for key in DESCRIPTION if key not in description]
    if missing:
        return f"lacks {', '.join(missing)}"
    for key, kind in DESCRIPTION.items():
        if type(description[key]) is not kind:
            return f"has {key}={description[key]!r}, which is not of type {kind.__name__}"
    classes, precision = description["classes"], description["precision"]
    if not all(isinstance(name, str) for name in classes) or not len(classes) == len(set(classes)) > 0:
        return f"has classes={classes!r}, which are not different names"
    for key, shape in LISTS.items():
        if fault := fault_in(description[key], shape, key):
            return f"has {fault}"
    thresholds, wanted = description["thresholds"], len(classes) if description["multi_label"] else 0
    if len(thresholds) != wanted or not all(isinstance(t, float | int) and 0 <= t <= 1 for t in thresholds):
        return f"has thresholds={thresholds!r}, which are not {wanted} scores from 0 to 1"
    if not 0 < description["temperature"] < math.inf:
        return f"has temperature={description['temperature']!r}, which is not a number above 0"
    if precision not in get_args(Precision):
        return f"has precision={precision!r}, which is not one of {', '.join(get_args(Precision))}"
    return ""


def weights_in_words(files: Iterable[Mapping[str, str]]) -> str:
    """The pretrained weights that a description says a run began with."""
    return " and ".join(f"{file['model']} ({file['source']}, sha256 {file['sha256'][:12]})" for file in files)
