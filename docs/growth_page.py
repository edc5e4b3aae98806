"""What `docs/scale.md` tells of growth, and its figure; all from what `benchmarks/growth.py` wrote."""

import json
from collections.abc import Sequence
from math import log
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results_page import table

from tokenfusion.report.plots import GRID, SERIES, STYLE, standalone, to_svg

DOCS = Path(__file__).parent
RESULT = DOCS.parent / "benchmarks" / "results" / "growth.json"
FIGURE = DOCS / "growth.svg"
Row = dict[str, Any]
QUANTITIES = {"macs": "multiply-adds", "memory_mb": "memory", "seconds": "time"}
NOISE_MB = 2.0
"""Below, a process's memory says more of the allocator than of what was done."""


def growth() -> str:
    """Tables by image size, batch and number of images, each with how it grows; writes the figure beside the page."""
    if not RESULT.exists():
        return "Not measured yet: `python benchmarks/growth.py --out benchmarks/results/growth.json`."
    found = json.loads(RESULT.read_text())
    for name, size in (("sizes", "pixels"), ("batches", "batch"), ("images", "images")):
        found[name].sort(key=itemgetter(size))
    FIGURE.write_text(standalone(plot(found["sizes"])) + "\n")
    timed = all(row["seconds"] is not None for name in ("sizes", "batches", "images") for row in found[name])
    untimed = "" if timed else " Times are not measured yet: `--times`, on a machine that does nothing else."
    return "\n\n".join(
        [
            f"On {found['hardware']}, one thread, fp32.{untimed} ∝ N^k: k is by the two largest sizes. "
            "–: not measured.",
            "**With the image's size**: one layer of 384 channels and 12 heads, one image of patches of 16 px.",
            "![Multiply-adds and memory of three kinds of attention against tokens, beside N and N²](growth.svg)",
            sizes(found["sizes"]),
            "**With the batch**: whole models at their own size, 224 or 240 px.",
            batches(found["batches"]),
            "**With the number of images**: what is done to all images of a data set at once. What neighbours are "
            "looked for in is mapped from the disk, and counts here, though the system can drop it.",
            images(found["images"]),
            walls(found),
        ]
    )


def power(rows: Sequence[Row], size: str, quantity: str) -> float | None:
    """k of ∝ size^k between the two largest sizes; None where it cannot be told."""
    if len(rows) < 2:
        return None
    before, last = rows[-2], rows[-1]
    if before[quantity] is None or last[quantity] is None or (quantity == "memory_mb" and last[quantity] < NOISE_MB):
        return None
    before_value = max(before[quantity], 1e-9)
    return log(max(last[quantity], 1e-9) / before_value) / log(last[size] / before[size])


def in_words(k: float | None) -> str:
    return "–" if k is None else f"{k:.1f}"


def mib(row: Row) -> str:
    """Its memory."""
    return f"{row['memory_mb']:,.1f}" if row["memory_mb"] < 10 else f"{row['memory_mb']:,.0f}"


def sizes(rows: Sequence[Row]) -> str:
    """Memory by image size, and how all that was measured grows."""
    pixels = sorted({row["pixels"] for row in rows})
    lines = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        for what in ("inference", "training"):
            mine = [row for row in rows if row["layer"] == layer and row["what"] == what]
            cells = [mib(row) for row in mine]
            powers = [in_words(power(mine, "tokens", quantity)) for quantity in QUANTITIES]
            lines.append([f"{layer}, {what}", *cells, *powers])
    return table(
        ["MiB of a layer", *(f"{size} px" for size in pixels), *(f"k, {what}" for what in QUANTITIES.values())], lines
    )


def batches(rows: Sequence[Row]) -> str:
    """Memory by batch, and what one more image takes."""
    counts, lines = sorted({row["batch"] for row in rows}), []
    for model in dict.fromkeys(row["model"] for row in rows):
        for what in ("inference", "training"):
            mine = [row for row in rows if row["model"] == model and row["what"] == what]
            cells = [mib(row) for row in mine]
            lines.append([f"`{model}`, {what}", *cells, f"{one_more(mine, 'batch'):,.1f}"])
    return table(["MiB of a model", *(f"batch {count}" for count in counts), "one more image"], lines)


def one_more(rows: Sequence[Row], size: str) -> float:
    """MiB that one more takes, between the two largest sizes."""
    before, last = rows[-2], rows[-1]
    return (last["memory_mb"] - before["memory_mb"]) / (last[size] - before[size])


def images(rows: Sequence[Row]) -> str:
    """Memory by the number of images."""
    counts, lines = sorted({row["images"] for row in rows}), []
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = {row["images"]: row for row in rows if row["what"] == what}
        cells = [mib(mine[count]) if count in mine else "–" for count in counts]
        each = f"{one_more(list(mine.values()), 'images') * 2**20:,.0f}"
        powers = [in_words(power(list(mine.values()), "images", quantity)) for quantity in ("memory_mb", "seconds")]
        lines.append([what, *cells, each, *powers])
    heading = ["MiB", *(f"{count:,} images" for count in counts), "bytes an image", "k, memory", "k, time"]
    return table(heading, lines)


def walls(found: dict[str, Any]) -> str:
    """Where a user hits a wall, in numbers that follow from the rows and from the package's own limits."""
    largest = max(row["pixels"] for row in found["sizes"])
    layer = next(
        row
        for row in found["sizes"]
        if (row["layer"], row["what"], row["pixels"]) == ("Re-attention", "training", largest)
    )
    fitted = [row for row in found["images"] if row["what"] == "linear classifier"]
    index = [row for row in found["images"] if row["what"] == "index of a folder"]
    million = 1e6 * one_more(fitted, "images") / 1024
    return "\n".join(
        [
            "Where that ends:",
            "",
            f"- **Re-attention's maps.** Training one layer on one image of {largest} px took "
            f"{layer['memory_mb'] / 1024:.1f} GiB on a CPU, where maps are formed, and a `deepvit_16` has 16 of them. "
            "By tiles, on a GPU, a layer keeps Q, K, V, its result and a number of each row; not measured there yet.",
            "- **What frozen parents see.** The default pair keeps, at 224 px, "
            f"{found['kept_bytes_an_image'] / 1e3:,.0f} kB an image, so that {found['kept_images_at_most']:,} images "
            f"fill the cache of {found['cache_gb']} GiB (`TOKENFUSION_CACHE_GB`); more are refused with that reason.",
            "- **Their linear classifier** has the means of all images in memory: by these rows, of 1,024 numbers an "
            f"image, {million:.0f} GiB for a million images.",
            f"- **Near duplicates** are searched pair by pair, and not among more than "
            f"{found['near_duplicates_at_most']:,} images; `check` says so.",
            f"- **The index** is in memory: by these rows {1e6 * one_more(index, 'images') / 1024:.1f} GiB for a "
            "million images in class folders, in every process.",
        ]
    )


def plot(rows: Sequence[Row]) -> Any:
    """Multiply-adds and memory against tokens, beside N and N²; time too where it was measured."""
    timed = all(row["seconds"] is not None for row in rows)
    panels = [("inference", "macs", "Multiply-adds, inference"), ("inference", "memory_mb", "MiB, inference")]
    panels.append(("training", "memory_mb", "MiB, training"))
    if timed:
        panels.append(("inference", "seconds", "Seconds, inference"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(panels), 3.6), layout="constrained")
        for axes, (what, quantity, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            draw(axes, [row for row in rows if row["what"] == what], quantity)
            axes.set(title=title, xlabel="tokens N", xscale="log", yscale="log")
        axes.legend(fontsize=8)
        return to_svg(figure, "growth", "Multiply-adds and memory of three kinds of attention against tokens")


def draw(axes: Axes, rows: Sequence[Row], quantity: str) -> None:
    """A line a layer, and the two of theory through the largest of Re-attention."""
    for layer, colour in zip(dict.fromkeys(row["layer"] for row in rows), SERIES, strict=False):
        mine = [row for row in rows if row["layer"] == layer and (quantity != "memory_mb" or row[quantity] > 0)]
        axes.plot([row["tokens"] for row in mine], [row[quantity] for row in mine], "o-", color=colour, label=layer)
    tokens, last = [row["tokens"] for row in mine], mine[-1][quantity]
    for k, dashes in ((1, ":"), (2, "--")):
        line = [last * (count / tokens[-1]) ** k for count in tokens]
        axes.plot(tokens, line, dashes, color=GRID, zorder=0, label="∝ N" + "²" * (k == 2))
