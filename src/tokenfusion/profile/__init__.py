"""What models cost: counted on any machine, measured on this one, compared with what their papers publish."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from tokenfusion.errors import InputError
from tokenfusion.hardware import Precision, as_dtype, default_device, hardware_name, resolve_precision
from tokenfusion.models import create_model, list_models
from tokenfusion.models.cost import Size, count_model
from tokenfusion.models.deepvit import maps_in_words
from tokenfusion.models.published import compare
from tokenfusion.profile.measurements import measure_model

Table = list[list[str]]

NOTES = {
    "≠": "ours differs from the published figure by more than 2 %",
    "≈": "so it does, but only because the published figure is rounded",
    "*": "counted on the official code, not printed in the paper",
    "attention": "the products q kᵀ and map·v, which the count of CrossViT's official code leaves out",
}


def select_models(patterns: Sequence[str]) -> list[str]:
    """Names that shell patterns match among this package's models; a name without wildcards stays, also if timm's.

    Raises:
        InputError: a pattern matches nothing.
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        matching = list_models(pattern) if set(pattern) & set("*?[") else [pattern]
        if not matching:
            raise InputError(f"no model matches {pattern!r}; `tokenfusion models` lists all of them")
        names |= dict.fromkeys(matching)
    return list(names)


def profile_models(
    names: Sequence[str],
    img_size: Size | None = None,
    batch_size: int = 8,
    precision: Precision = "auto",
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> tuple[dict[str, Any], Table, list[str]]:
    """Count and measure what models cost in inference.

    Args:
        names: as in `create_model`.
        img_size: height and width in pixels; each model's own when not given.
        batch_size: images of a forward pass.
        precision: arithmetic of the matrix products; auto takes bf16 where the hardware has it.
        track: wraps the names while they are measured, to show progress.

    Returns:
        What it was measured on and with, and under `models` a row for each name: raw numbers, memory in MiB; these
        as a table; and notes on it.

    Raises:
        InputError: an unknown name, an image size that a model cannot take, a batch that does not fit into memory.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is no batch; give at least 1")
    counted = {name: count_model(name, img_size=img_size) for name in names}
    rows = []
    for name in track(counted):
        counts, size = counted[name]
        measured = measure_model(name, size, batch_size, precision)
        rows.append({"name": name, "img_size": list(size), **asdict(counts), **asdict(measured)})
    device = default_device()
    result = {
        "hardware": hardware_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "precision": resolve_precision(precision, device),
        "batch_size": batch_size,
    }
    measured_on = "inference on {hardware}, {threads} threads, torch {torch}, {precision}, batches of {batch_size}"
    on_gpu = counted if device.type == "cuda" else ()  # elsewhere there is nothing to say
    notes = [f"{name}: {said}" for name in on_gpu if (said := said_of_maps(name, precision, device))]
    return result | {"models": rows}, cost_table(rows), [measured_on.format(**result), *notes]


def said_of_maps(name: str, precision: Precision, device: torch.device) -> str:
    """What there is to say of a model's Re-attention on a device."""
    with torch.device("meta"):
        return maps_in_words(create_model(name).eval(), as_dtype(precision, device), device)


def profile_papers(names: Sequence[str]) -> tuple[dict[str, Any], Table, list[str]]:
    """Count what models cost, beside what is published of them; as `profile_models`, but nothing is timed."""
    rows = compare_with_papers(names)
    return {"models": rows}, paper_table(rows), [f"{sign}: {note}" for sign, note in NOTES.items()]


def compare_with_papers(names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each name: raw numbers, and under `published` what `published.compare` gives.

    Raises:
        InputError: an unknown name.
    """
    rows = []
    for name in names:
        counts, size = count_model(name)
        ours = {
            "parameters_m": counts.parameters / 1e6,
            "gmacs": counts.macs / 1e9,
            "gmacs_without_attention": (counts.macs - counts.attention_macs) / 1e9,
        }
        rows.append({"name": name, "img_size": list(size), **asdict(counts), "published": compare(name, ours)})
    return rows


def cost_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of `profile_models` as text, under a line of headings."""
    table = [["model", "input", "parameters M", "GMACs", "activations M", "peak memory MiB", "images/s"]]
    for row in rows:
        size, memory = "×".join(map(str, row["img_size"])), row["peak_memory_mb"]
        counts = f"{row['parameters'] / 1e6:.2f}", giga(row["macs"]), f"{row['activations'] / 1e6:.2f}"
        took = "unknown" if memory is None else f"{memory:,.0f}", f"{row['images_per_second']:,.1f}"
        table.append([row["name"], size, *counts, *took])
    return table


def paper_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of `compare_with_papers` as text, under a line of headings; `NOTES` explains the signs."""
    count_headings = ("parameters M", "GMACs", "GMACs without attention")
    table = [["model", *(word for heading in count_headings for word in (heading, "published")), "published top-1 %"]]
    for row in rows:
        parameters, macs, without, top1 = (
            figures_text(row["published"].get(quantity, []))
            for quantity in ("parameters_m", "gmacs", "gmacs_without_attention", "top1")
        )
        ours = f"{row['parameters'] / 1e6:.2f}", giga(row["macs"]), giga(row["macs"] - row["attention_macs"])
        table.append([row["name"], ours[0], parameters, ours[1], macs, ours[2], without, top1])
    return table


def giga(count: int) -> str:
    """A count in billions, to three digits."""
    return f"{count / 1e9:.3f}" if count < 1e9 else f"{count / 1e9:.2f}"


def figures_text(figures: Sequence[Mapping[str, Any]]) -> str:
    """Published figures with the signs that `NOTES` explains."""
    texts = []
    for figure in figures:
        text = figure["printed"] + ("*" if figure["source"] == "code" else "")
        if figure.get("differs"):
            text += f" {'≈' if figure['rounds'] else '≠'} {figure['difference']:+.1%}"
        texts.append(text)
    return ", ".join(texts) or "none"
