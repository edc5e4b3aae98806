"""Figures of a comparison: accuracy against cost, and accuracy over the epochs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tokenfusion.names import is_fused
from tokenfusion.report.comparison_summary import Row, interval, rank
from tokenfusion.report.plots import SERIES, TEXT, drawing, over_epochs, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, LINE = 11.0, 0.22
"""Of a figure and of a line of text, in inches."""
DASHES = ("-", "--", ":")
Looks = Mapping[str, tuple[str, str]]
"""Colour and dashes of each model, by its name."""


def looks_of(result: Mapping[str, Any]) -> Looks:
    """A colour and dashes for each model, the same in every figure: by its place among the models that were named."""
    names = [row["name"] for row in result["models"]]
    return {name: (SERIES[i % len(SERIES)], DASHES[i // len(SERIES) % len(DASHES)]) for i, name in enumerate(names)}


def plot_cost(result: Mapping[str, Any]) -> Markup:
    """Accuracy against multiply-adds, with 95 % intervals; a dashed line joins those that are best for their cost.

    Args:
        result: what `comparison.json` holds; at least one run is finished.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    rows, looks = {row["name"]: row for row in rank(result)}, looks_of(result)
    unit, name = (1e9, "billions") if max(row["macs"] for row in rows.values()) >= 1e9 else (1e6, "millions")
    costs = [row["macs"] / unit for row in rows.values()]
    with drawing(WIDTH, height_for(len(rows))) as (figure, axes):
        front = [rows[name] for name in result["pareto"]]
        axes.plot([r["macs"] / unit for r in front], [100 * r["top1_mean"] for r in front], "--", color=TEXT, lw=1.2)
        for row in rows.values():
            draw_point(axes, row, row["macs"] / unit, looks[row["name"]][0])
        axes.set_xscale("log")
        middle = (min(costs) * max(costs)) ** 0.5  # at least a factor of two, so that equal costs look equal
        axes.set_xlim(min(min(costs) / 1.1, middle / 1.5), max(max(costs) * 1.1, middle * 1.5))
        axes.set_ylim(*accuracy_range(list(rows.values())))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8), numticks=30))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set(title="Top-1 accuracy (%)", xlabel=f"{name} of multiply-adds an image, logarithmic")
        points = [(row["macs"] / unit, 100 * row["top1_mean"], name) for name, row in rows.items()]
        label_beside(axes, points, [looks[name] for name in rows])
        return to_svg(figure, "cost", "Top-1 accuracy against multiply-adds of each model")


def draw_point(axes: "Axes", row: Row, cost: float, colour: str) -> None:
    """A model's mean and interval; fused models are diamonds."""
    low, high = interval(row)
    below, above = row["top1_mean"] - low, high - row["top1_mean"]
    look: dict[str, Any] = {"color": colour, "fmt": "D" if is_fused(row["name"]) else "o"}
    axes.errorbar(
        cost, 100 * row["top1_mean"], [[100 * below], [100 * above]], capsize=3, elinewidth=1.2, markersize=6, **look
    )


def accuracy_range(rows: Sequence[Row]) -> tuple[float, float]:
    """Limits in percent that show all means, and of wide intervals no more than the means' own range to either side."""
    means = [row["top1_mean"] for row in rows]
    room = max(max(means) - min(means), 0.01)
    low = max(min(interval(row)[0] for row in rows), min(means) - room, 0.0)
    high = min(max(interval(row)[1] for row in rows), max(means) + room, 1.0)
    margin = 0.05 * (high - low)
    return 100 * (low - margin), 100 * (high + margin)


def plot_accuracy(curves: Mapping[str, Sequence[tuple[int, float]]], looks: Looks) -> Markup:
    """Held-out accuracy at each epoch, a line a model.

    Args:
        curves: of each model (epoch, accuracy), at least one.
        looks: of the models' lines.
    """
    with drawing(WIDTH, height_for(len(curves))) as (figure, axes):
        ends = []
        for name, points in curves.items():
            colour, dashes = looks[name]
            at, values = [epoch for epoch, _ in points], [100 * accuracy for _, accuracy in points]
            axes.plot(at, values, dashes, color=colour, marker="o" if len(at) < 8 else "", markersize=4)
            ends.append((at[-1], values[-1], name))
        axes.set(title="Held-out accuracy (%)")
        over_epochs(axes)
        label_beside(axes, ends, [looks[name] for name in curves])
        return to_svg(figure, "epochs", "Held-out accuracy of each model at each epoch")


def height_for(lines: int) -> float:
    """Height of a figure that has room for this many names beside it."""
    return max(4.2, LINE * lines + 1.2)


def label_beside(axes: "Axes", points: Sequence[tuple[float, float, str]], looks: Sequence[tuple[str, str]]) -> None:
    """Write names in a column right of the axes, as near to the height of their points as leaves room for each.

    Args:
        axes: with their final limits.
        points: (x, y, name).
        looks: colour and dashes of each point's line, which lead to its name.
    """
    low, high = axes.get_ylim()
    gap = LINE / (height_for(len(points)) - 1.0)
    heights = spread([(y - low) / (high - low) for _, y, _ in points], gap)
    for (x, y, name), height, (colour, dashes) in zip(points, heights, looks, strict=True):
        line = {"arrowstyle": "-", "color": colour, "ls": dashes, "lw": 1, "relpos": (0, 0.5)}
        axes.annotate(
            name,
            (x, y),
            (1.03, height),
            textcoords="axes fraction",
            va="center",
            annotation_clip=False,
            parse_math=False,
            arrowprops=line | {"shrinkA": 2, "shrinkB": 5},
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights within 0 to 1, at least `gap` apart and in the same order, whose squares of moves are smallest."""
    from scipy.optimize import isotonic_regression

    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    stacked = isotonic_regression([wanted[i] - gap * n for n, i in enumerate(order)]).x
    highest = max(1 - gap * (len(wanted) - 1), 0.0)
    heights = dict(zip(order, stacked.clip(0, highest), strict=True))
    return [float(heights[i]) + gap * order.index(i) for i in range(len(wanted))]
