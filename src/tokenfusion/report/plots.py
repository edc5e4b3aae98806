"""Figures as inline SVG that takes its colours from the page, so that light, dark and print each look right."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tokenfusion.metrics import Bins
from tokenfusion_runtime.output import spelled_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stand for the page's own, replaced once the figure is drawn.
TEXT, GRID, TRAIN, HELD_OUT = "#010101", "#020202", "#030303", "#040404"
SERIES = tuple(f"#05050{i}" for i in range(8))
PAGE_COLOURS = {TEXT: "currentColor", GRID: "var(--line)", TRAIN: "var(--train)", HELD_OUT: "var(--held-out)"}
PAGE_COLOURS |= {colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)}

STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
    "svg.hashsalt": "tokenfusion",  # the same numbers give the same file
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "legend.frameon": False,
    "lines.linewidth": 2,
}


COLLAPSE = {
    "neighbour_similarity": "neighbouring blocks",
    "head_similarity": "heads of a block",
    "token_similarity": "tokens behind the last",
    "similar_blocks": "share of similar blocks",
    "entropy": "entropy / uniform's",
}
"""What is watched of attention collapse from 0 to 1, and its name in the legend."""


def plot_curves(epochs: Sequence[dict[str, Any]]) -> list[Markup]:
    """Loss, accuracy and learning rate over the epochs, and attention collapse where it was watched: a figure each.

    Args:
        epochs: the lines of metrics.jsonl.
    """
    loss = plot_lines("loss", "Loss", epochs, {"train_loss": "training", "val_loss": "held out"})
    title, lines = "Accuracy (%)", {"train_top1": "training", "val_top1": "held out"}
    if "val_map" in epochs[-1]:
        title = "Exact match and mAP (%)"
        lines = {"train_exact_match": "training, exact match", "val_map": "held out, mAP"}
    accuracy = plot_lines("accuracy", title, epochs, lines, 100)
    return [loss, accuracy, plot_lines("lr", "Learning rate", epochs, {"lr": ""}), *plot_collapse(epochs)]


def plot_collapse(epochs: Sequence[dict[str, Any]]) -> list[Markup]:
    """Attention collapse over the epochs that it was looked at in; nothing where there are none."""
    watched = [epoch for epoch in epochs if "collapse/neighbour_similarity" in epoch]
    if not watched:
        return []
    shares = {f"collapse/{key}": label for key, label in COLLAPSE.items() if f"collapse/{key}" in watched[-1]}
    figures = [plot_lines("collapse", "Attention collapse", watched, shares)]
    if "collapse/effective_rank" in watched[-1]:
        rank = {"collapse/effective_rank": ""}
        figures.append(plot_lines("rank", "Effective rank of the tokens", watched, rank))
    return figures


def plot_lines(
    name: str, title: str, epochs: Sequence[dict[str, Any]], lines: dict[str, str], scale: float = 1
) -> Markup:
    """A figure of one or more numbers over the epochs.

    Args:
        name: the figure's name within the page.
        title: what is drawn, with its unit.
        epochs: the lines of metrics.jsonl.
        lines: the keys to draw, with their names in the legend; a missing value or null leaves a gap.
        scale: what the values are multiplied by.
    """
    with drawing(4.2, 2.9) as (figure, axes):
        at = [epoch["epoch"] for epoch in epochs]
        for (key, label), colour in zip(lines.items(), (TRAIN, HELD_OUT, *SERIES[2:]), strict=False):
            values = [float("nan") if epoch.get(key) is None else epoch[key] * scale for epoch in epochs]
            axes.plot(at, values, color=colour, label=label, marker="o" if len(at) < 8 else "", markersize=4)
        axes.set_title(title)
        over_epochs(axes)
        if len(lines) > 1:
            axes.legend()
        return to_svg(figure, name, f"{title} at each epoch")


def over_epochs(axes: "Axes") -> None:
    """Whole numbers of epochs along the horizontal axis."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def plot_lr_range(tested: dict[str, Any]) -> Markup:
    """The loss at each rate of a range test, its running mean, and the rate that was chosen.

    Args:
        tested: as in lr_range.json.
    """
    with drawing(4.2, 2.9) as (figure, axes):
        axes.plot(tested["rates"], tested["losses"], color=GRID, label="loss", linewidth=1)
        axes.plot(tested["rates"], tested["smoothed"], color=TRAIN, label="smoothed")
        axes.axvline(tested["chosen"], color=TEXT, linestyle="--", linewidth=1.2, label=f"chosen: {tested['chosen']:g}")
        axes.set(xscale="log", title="Loss in the range test", xlabel="learning rate")
        axes.set_ylim(0, 2 * max(tested["smoothed"][0], min(tested["smoothed"])))
        axes.legend()
        return to_svg(figure, "lr-range", f"Loss in the range test; the learning rate {tested['chosen']:g} was chosen")


def plot_reliability(bins: Bins) -> Markup:
    """Accuracy against confidence, above how many images have that confidence."""
    from matplotlib.ticker import PercentFormatter

    with drawing(4.8, 4.8, nrows=2, sharex=True, height_ratios=(3, 1)) as (figure, (upper, lower)):
        width = bins.edges[1] - bins.edges[0]
        filled = bins.count > 0
        upper.bar(bins.edges[:-1][filled], bins.accuracy[filled] * 100, width * 0.92, align="edge", color=HELD_OUT)
        upper.plot([0, 1], [0, 100], color=TEXT, linestyle="--", linewidth=1.2)
        upper.plot(bins.confidence[filled], bins.accuracy[filled] * 100, "o", color=TRAIN, markersize=5)
        upper.set(xlim=(0, 1), ylim=(0, 103), title="Accuracy (%) at each confidence")
        lower.bar(bins.edges[:-1][filled], bins.count[filled], width * 0.92, align="edge", color=HELD_OUT)
        lower.set(xlabel="confidence of the prediction", title="Images")
        lower.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        return to_svg(figure, "reliability", "Reliability diagram: accuracy against confidence")


def plot_risk_coverage(curves: Mapping[str, Mapping[str, Any]]) -> Markup:
    """The share of wrong answers against the share of images that are answered, the surest first.

    Args:
        curves: what `metrics.risk_coverage` gives, by class; by "" alone where an image has one class. Of many classes
            those with the largest area are drawn.
    """
    worst = sorted(curves, key=lambda name: -curves[name]["area"])[: len(SERIES)]
    with drawing(4.8, 3.2) as (figure, axes):
        for name, colour in zip(worst, SERIES, strict=False):
            coverage, risk = ([100 * value for value in curves[name][key]] for key in ("coverage", "risk"))
            axes.plot(
                coverage, risk, color=colour, label=f" {spelled_out(name, layout=True)}"
            )  # one that begins with _ were hidden
        axes.set(xlim=(0, 100), title="Wrong answers (%)", xlabel="answered, the surest first (%)")
        axes.set_ylim(bottom=0)
        if "" not in curves:
            for text in axes.legend().get_texts():
                text.set_parse_math(False)
        return to_svg(
            figure, "risk-coverage", "Risk against coverage: wrong answers against the share that is answered"
        )


def plot_corruptions(found: Mapping[str, Any]) -> Markup:
    """Accuracy on images as they are and made worse, a line for each kind; see `measure_corruptions`."""
    with drawing(4.8, 3.2) as (figure, axes):
        for (name, kind), colour in zip(found["corruptions"].items(), SERIES, strict=False):
            top1 = [found["top1"], *(level["top1"] for level in kind["levels"])]
            axes.plot(range(len(top1)), [100 * value for value in top1], "o-", color=colour, label=name, markersize=4)
        axes.set_xticks(range(4), ["as it is", "mild", "medium", "strong"])
        axes.set(title="Accuracy on worse images (%)")
        axes.set_ylim(bottom=0)
        axes.legend()
        return to_svg(figure, "corruptions", "Accuracy on images made worse, by kind and level")


@contextmanager
def drawing(width: float, height: float, **grid: Any) -> Iterator[tuple["Figure", Any]]:
    """A figure of some inches and its axes, to be drawn and written as SVG inside the context.

    Args:
        width, height: in inches.
        grid: as `Figure.subplots` takes it.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(**grid)


def to_svg(figure: "Figure", name: str, description: str) -> Markup:
    """Draw a figure as SVG to be put into a page.

    Args:
        figure: drawn with STYLE and the colours above.
        name: precedes every id, so that figures on one page do not mix.
        description: what a reader who cannot see it is told.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub("|".join(PAGE_COLOURS), lambda match: PAGE_COLOURS[match[0]], svg)
    label = Markup('<svg role="img" aria-label="{}"').format(description)
    return label + Markup(svg.removeprefix("<svg"))


def standalone(svg: Markup) -> str:
    """A figure as a file of its own, with the page's colours in light and dark."""
    colours = (Path(__file__).parent / "colours.css").read_text(encoding="utf-8")
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    start = f"<svg {names}{svg[len('<svg') : svg.index('>') + 1]}"
    style = f"<style>\n{colours}svg {{ background: var(--page); color: var(--text); }}\n</style>"
    return f"{start}\n{style}{svg[svg.index('>') + 1 :]}"
