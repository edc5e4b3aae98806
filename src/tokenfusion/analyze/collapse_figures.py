"""The figures of an analysis of collapse, as PNG and SVG.

Letters: B batch, H heads, N query tokens, M key tokens, D head width, h w grid.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenfusion.analyze.record import AttentionRecord, evaluating, record_attention
from tokenfusion.files import write_atomic
from tokenfusion.layers.attend import split_heads
from tokenfusion.layers.tokens import TokenLayout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Extent = tuple[float, float, float, float]
BLOCKS_SHOWN = 6
VALUE_LAYERS = {"qkv": 3, "v": 1, "attention.qkv": 3}
"""Where an attention module's values come from, and of how many parts they are the last."""
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "tokenfusion",  # the same numbers give the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


class FeatureMaps(NamedTuple):
    """How much every patch gets from attention: the length of attention times V, over heads and widths.

    Attributes:
        block: the attention module's dotted name.
        before: (B, h, w), by the map after the softmax.
        after: (B, h, w), by the mixed map; None without Re-attention.
    """

    block: str
    before: Tensor
    after: Tensor | None


@torch.no_grad()
def feature_maps(model: nn.Module, images: Tensor) -> list[FeatureMaps]:
    """Attention times V of every block whose values come from a layer named below, and whose queries have a grid."""
    values: dict[str, Tensor] = {}

    def see(name: str, parts: int, _layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        values[name] = output.chunk(parts, dim=2)[-1]

    def attend(record: AttentionRecord) -> FeatureMaps | None:
        place = placed(record.layout.queries)
        if record.name not in values or place is None:
            return None
        value = split_heads(values.pop(record.name), record.map.shape[1])
        after = None if record.mixed is None else attended(record.mixed, value, *place)
        return FeatureMaps(record.name, attended(record.map, value, *place), after)

    with evaluating(model), record_attention(model, reduce=attend) as records, ExitStack() as stack:
        for name in records:
            for part, layer in model.get_submodule(name).named_modules():
                if part in VALUE_LAYERS:
                    hook = partial(see, name, VALUE_LAYERS[part])
                    stack.callback(layer.register_forward_hook(hook).remove)
        model(images)
    return [found for record in records.values() for found in record.reduced if found]


def placed(tokens: TokenLayout) -> tuple[int, tuple[int, int]] | None:
    """Where the first tokens that have a place begin, and their grid."""
    start = 0
    for group in tokens:
        if group.grid:
            return start, group.grid
        start += group.count
    return None


def attended(maps: Tensor, values: Tensor, start: int, grid: tuple[int, int]) -> Tensor:
    """Length of map times values: (B, H, N, M) and (B, H, M, D) to (B, h, w)."""
    length = (maps @ values.to(maps)).square().sum((1, 3)).sqrt()
    return length[:, start : start + grid[0] * grid[1]].reshape(-1, *grid).float().cpu()


def write_figures(result: dict[str, Any], folder: Path, pictures: Tensor, features: Sequence[FeatureMaps]) -> list[str]:
    """Draw curves, the block × block map and heads × blocks of each group, and the feature maps; gives their names.

    Args:
        result: of `measure_collapse`.
        folder: where to write NAME.png and NAME.svg.
        pictures: the images of the feature maps, uint8 (B, 1 or 3, h, w).
        features: of the same images.
    """
    import matplotlib

    names = []
    with matplotlib.rc_context(STYLE):
        for i, group in enumerate(result["groups"]):
            suffix = f"-{i + 1}" if len(result["groups"]) > 1 else ""
            blocks = [block for block in result["blocks"] if block["name"] in group["blocks"]]
            for name, figure in group_figures(group, blocks):
                names += write_figure(folder, name + suffix, figure)
        for kind in () if features else ("png", "svg"):  # of another model
            (folder / f"feature_maps.{kind}").unlink(missing_ok=True)
        if features:
            names += write_figure(folder, "feature_maps", draw_features(pictures, features))
    return names


def group_figures(group: dict[str, Any], blocks: Sequence[dict[str, Any]]) -> "Iterator[tuple[str, Figure]]":
    """The three figures of a group, each with its name."""
    depth, heads = len(blocks), len(group["previous_by_head"])
    figure, axes = new_figure(group)
    for k, values in group["neighbours"].items():
        axes.plot(range(1 + int(k), depth + 1), values, marker="o", markersize=3, label=f"to the block {k} before")
    if heads > 1:
        within = [block["head_similarity"] for block in blocks]
        axes.plot(range(1, depth + 1), within, linestyle="--", color="grey", label="between the block's heads")
    axes.axhline(0.8, color="grey", linewidth=0.7)
    axes.set(ylabel="cosine similarity", ylim=(min(0, axes.get_ylim()[0]), 1.02))
    axes.legend()
    yield "curves", figure
    extent = (0.5, depth + 0.5)
    across = (1.5, depth + 0.5, 0.5, heads + 0.5)
    yield "block_by_block", heat_map(group, group["similarity"], (*extent, *extent), "block", "similarity of attention")
    by_head = group["previous_by_head"]
    yield "heads_by_block", heat_map(group, by_head, across, "head", "similarity to the block before")


def heat_map(group: dict[str, Any], values: Any, extent: Extent, ylabel: str, label: str) -> "Figure":
    figure, axes = new_figure(group)
    least = -1 if min(map(min, values)) < 0 else 0  # mixed maps can be opposed
    drawn = axes.imshow(values, vmin=least, vmax=1, aspect="auto", origin="lower", extent=extent)
    axes.set(ylabel=ylabel)
    axes.locator_params(axis="y", integer=True)
    figure.colorbar(drawn, label=label)
    return figure


def new_figure(group: dict[str, Any]) -> "tuple[Figure, Axes]":
    """A figure over the blocks of a group, and its axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="block", title=f"{group['blocks'][0]} to {group['blocks'][-1]}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def draw_features(pictures: Tensor, features: Sequence[FeatureMaps]) -> "Figure":
    """An image a row, or two where blocks re-attend (before and after the mixing), and a few blocks as columns."""
    from matplotlib.figure import Figure

    last = len(features) - 1
    shown = [features[i] for i in sorted({round(i * last / (BLOCKS_SHOWN - 1)) for i in range(BLOCKS_SHOWN)})]
    mixed = any(feature.after is not None for feature in shown)
    rows = [(picture, after) for picture in range(len(pictures)) for after in ((False, True) if mixed else (False,))]
    figure = Figure(figsize=(1.5 * (len(shown) + 1), 1.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(shown) + 1, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, (picture, after) in zip(grid, rows, strict=True):
        channels = pictures[picture].permute(1, 2, 0)
        line[0].imshow(channels.expand(*channels.shape[:2], 3).numpy())
        line[0].set_title("after mixing" if after else "before mixing" if mixed else "", fontsize=8)
        for axes, feature in zip(line[1:], shown, strict=True):
            maps = feature.after if after else feature.before
            if maps is not None:
                values = maps[picture].numpy()
                axes.imshow(values, vmin=min(values.min(), 0.95 * values.max()))  # rounding errors stay unseen
                axes.set_title(feature.block, fontsize=7)
    return figure


def write_figure(folder: Path, name: str, figure: "Figure") -> list[str]:
    """Write a figure as PNG and SVG; gives the two names."""
    files = [f"{name}.png", f"{name}.svg"]
    for file in files:
        kind = file[-3:]
        metadata = {"Date": None} if kind == "svg" else None
        write_atomic(folder / file, partial(figure.savefig, format=kind, dpi=120, metadata=metadata))
    return files
