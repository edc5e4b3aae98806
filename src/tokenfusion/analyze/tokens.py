"""Which tokens decide: what CLS attends to, where its content comes from, and what is lost without either kind.

Letters: B batch, H heads, N query tokens, M key tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenfusion.analyze.ablation import WHOLE, Batches, measure_ablation
from tokenfusion.analyze.collapse_figures import STYLE, write_figure
from tokenfusion.analyze.inputs import open_run_or_model, output_folder
from tokenfusion.analyze.record import AttentionRecord, attention_layouts, evaluating, record_attention
from tokenfusion.analyze.rollout import attention_rollout, by_source, require_followed
from tokenfusion.analyze.token_spans import token_spans
from tokenfusion.classifier import Classifier
from tokenfusion.data.decoded import Images
from tokenfusion.data.loader import eval_batches
from tokenfusion.errors import InputError
from tokenfusion.files import own_folder, write_json
from tokenfusion.formatting import Progress, unheard
from tokenfusion.hardware import keep_freed_memory
from tokenfusion.intervals import mean_interval
from tokenfusion.layers.tokens import AttentionLayout, TokenLayout, size_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCH, MAP_ELEMENTS = 64, 2**21
"""Images in the model at once, and elements of one head's maps of them: whichever is less."""
COLOURS = {"pixel": "tab:orange", "patch": "tab:blue", "small_patch": "tab:green", "large_patch": "tab:purple"}


class PreparedBatches:
    """Images and labels in batches as the model takes them, prepared anew in every pass, so that few are in memory."""

    def __init__(self, classifier: Classifier, images: Images) -> None:
        self.classifier, self.images = classifier, images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        preprocess = self.classifier.preprocess
        for batch, labels in eval_batches(self.images, preprocess, batch_size=self.batch_size()):
            yield self.classifier.to_input(batch), labels

    def batch_size(self) -> int:
        layouts = attention_layouts(self.classifier.model, self.classifier.preprocess.img_size).values()
        largest = max(prod(sum(group.count for group in tokens) for tokens in layout) for layout in layouts)
        return min(BATCH, max(1, MAP_ELEMENTS // largest))


def ranges(tokens: TokenLayout) -> dict[str, tuple[int, int]]:
    """First and last-but-one token of each source."""
    found, start = {}, 0
    for source, groups in by_source(tokens).items():
        stop = start + sum(group.count for group in groups)
        found[source], start = (start, stop), stop
    return found


def attending(layouts: Mapping[str, AttentionLayout]) -> str:
    """Whose attention is looked at: that of CLS, or where a model has none, of its patches."""
    queries = {group.source for layout in layouts.values() for group in layout.queries}
    return "cls" if any(source.endswith("cls") for source in queries) else "patch"


def attention_by_token(maps: Tensor, layout: AttentionLayout, attends: str) -> dict[str, Tensor]:
    """What CLS or the patches give to each key, by the key's source: from maps (B, H, N, M), (B, tokens) each.

    Learned queries attend for CLS, which is told. Nothing where none of them is among the queries.
    """
    kinds = ("cls", "query") if attends == "cls" else (attends,)
    rows = [maps[:, :, start:stop] for name, (start, stop) in ranges(layout.queries).items() if name.endswith(kinds)]
    if not rows:
        return {}
    mean = torch.cat(rows, dim=2).mean((1, 2)).float().cpu()  # (B, M)
    return {source: mean[:, start:stop] for source, (start, stop) in ranges(layout.keys).items()}


def measure_attention(model: nn.Module, batches: Batches) -> list[dict[str, Any]]:
    """What share of its attention CLS gives to the tokens of each source, by layer in the order of the computation."""
    attends = attending(attention_layouts(model))
    seen: dict[str, dict[str, list[Tensor]]] = {}

    def see(record: AttentionRecord) -> None:
        for source, given in attention_by_token(record.map, record.layout, attends).items():
            seen.setdefault(record.name, {}).setdefault(source, []).append(given.sum(1))

    with record_attention(model, reduce=see) as records:
        for images, _ in batches:
            model(images)
    layers = []
    for name, given in seen.items():
        counts = {source: stop - start for source, (start, stop) in ranges(records[name].layout.keys).items()}
        shares = {
            source: {"tokens": counts[source], "share_of_tokens": counts[source] / sum(counts.values())}
            | {"attention": mean_interval(torch.cat(values))}
            for source, values in given.items()
        }
        layers.append({"layer": name, "asks": attends, "to": shares})
    return layers


def measure_rollout(model: nn.Module, batches: Batches) -> dict[str, Any]:
    """Where what the head reads comes from by attention rollout: the share of each source."""
    shares: dict[str, list[Tensor]] = {}
    for images, _ in batches:
        for source, share in attention_rollout(model, images).shares().items():
            shares.setdefault(source, []).append(share)
    return {source: mean_interval(torch.cat(values)) for source, values in shares.items()}


@torch.no_grad()
def measure_tokens(model: nn.Module, batches: Batches, progress: Progress = unheard) -> dict[str, Any]:
    """Which kind of token decides what a model says.

    Args:
        model: a fusion of this package, or a transformer alone, whose attention can be seen; it is left as it was.
        batches: images (B, in_chans, H, W) of one size as the model takes them, with labels (B,); gone through several
            times.
        progress: told of what takes longest, the replacements.

    Returns:
        `images`; `attention`: of each layer, how many tokens of each source CLS attends to, their share, and the share
        of its attention that they get; `rollout`: the share of each source in what the head reads (`Rollout`), empty
        where that cannot be followed, `no_rollout` being the reason; `top1`, `loss`, `replaced` and `compared`, as
        `measure_ablation` gives them. Means over images, with 95 % intervals.

    Raises:
        InputError: no image; no attention that can be seen; a model without a row of blocks, such as CMT or a CNN.
    """
    size = next((size_of(images) for images, _ in batches), None)
    if size is None:
        raise InputError("no image is given; which tokens decide is measured on images")
    token_spans(model, size)  # refuses before anything is computed
    with evaluating(model):
        attention = measure_attention(model, batches)
        refused = why_no_rollout(model, size)
        rollout = {} if refused else measure_rollout(model, batches)
    found = {"attention": attention, "rollout": rollout, "no_rollout": refused}
    return found | measure_ablation(model, batches, progress)


def why_no_rollout(model: nn.Module, size: tuple[int, int]) -> str:
    """Why rollout cannot follow a model for images (H, W); "" where it can."""
    try:
        require_followed(model, size)
    except InputError as refusal:
        return str(refusal).partition(";")[0]
    return ""


def analyze_tokens(
    run_or_model: str,
    data: str | None = None,
    *,
    num_images: int = 256,
    out: Path | None = None,
    progress: Progress = unheard,
) -> tuple[dict[str, Any], Path]:
    """Measure which tokens decide in a run, or in an untrained model; write `tokens.json` and a figure.

    Args:
        run_or_model, data, num_images: as in `open_run_or_model`.
        out: folder to write to; RUN/tokens, or `tokens` for a model's name, when not given.
        progress: told of the images that are read, and of the replacements.

    Returns:
        what `tokens.json` holds (see `measure_tokens`), with `model`, `summary` and `figures`; and the folder.

    Raises:
        InputError: the model or the data cannot be used, or as in `measure_tokens`.
    """
    folder = output_folder(run_or_model, data, out, "tokens")
    classifier, images = open_run_or_model(run_or_model, data, num_images, partial(progress, "reading images"))
    keep_freed_memory()
    batches = PreparedBatches(classifier, images)
    result = {"model": classifier.name} | measure_tokens(classifier.model, batches, progress)
    result["summary"] = tokens_summary(result)
    with own_folder(folder):
        result["figures"] = draw(result, folder)
        write_json(folder / "tokens.json", result)
    return result, folder


def tokens_summary(result: dict[str, Any]) -> str:
    """A paragraph on what `measure_tokens` found."""
    whole = [row for row in result["replaced"] if row["layer"] == WHOLE]
    single = [row for row in result["replaced"] if row["layer"] != WHOLE]
    sentences = [f"As it is, the model is right on {result['top1']:.1%} of {result['images']:,} images."]
    sentences += [f"Without its {row['tokens']} tokens at all {loses(row)}." for row in whole]
    sentences += [on_the_stronger(pair) for pair in result["compared"]]
    worst = max(single, key=lambda row: row["loss_change"]["mean"])
    if len(single) > len(whole) and (worst["loss_change"]["ci95"] or [0])[0] > 0:
        sentences.append(f"Of single layers, {worst['layer']} needs its {worst['tokens']} tokens most: {loses(worst)}.")
    sentences.append(on_attention(result["attention"]))
    shares = [f"{share['mean']:.0%} {source}" for source, share in result["rollout"].items()]
    sentences.append(
        f"By rollout, what the head reads comes from {', '.join(shares)}."
        if shares
        else f"Where it comes from is not said: {result['no_rollout']}."
    )
    return " ".join(sentences)


def on_attention(layers: Sequence[dict[str, Any]]) -> str:
    """What the kinds of tokens get of the attention, beside their number, over the layers that attend to them."""
    who = "CLS gives" if layers[0]["asks"] == "cls" else "a patch gives"
    parts = []
    for source in COLOURS:
        given = [layer["to"][source] for layer in layers if source in layer["to"]]
        if given:
            attention = fmean(one["attention"]["mean"] for one in given)
            share = fmean(one["share_of_tokens"] for one in given)
            parts.append(f"{attention:.0%} to the {source} tokens, which are {share:.0%} of them")
    return f"Of its attention, {who}, over the layers that attend to them, {', and '.join(parts)}."


def loses(row: dict[str, Any]) -> str:
    """What is left of accuracy, and how much it and the loss change."""
    change = row["top1_change"]
    interval = f" (95 % interval {points(change['ci95'][0])} to {points(change['ci95'][1])})" if change["ci95"] else ""
    loss = row["loss_change"]["mean"]
    return f"it is right on {row['top1']:.1%}, {points(change['mean'])} points{interval}, loss {loss:+.3f}"


def points(share: float) -> str:
    """A change in percentage points, with its sign."""
    return f"{100 * share:+.1f}"


def on_the_stronger(pair: dict[str, Any]) -> str:
    """Which of two kinds of tokens the model needs more, if the interval of the loss between them leaves 0 out."""
    one, other = pair["tokens"]
    low, high = pair["loss_difference"]["ci95"] or (0, 0)
    if low > 0 or high < 0:
        needed, by = (one, (low, high)) if low > 0 else (other, (-high, -low))
        return f"It needs the {needed} tokens more: without them the loss is {by[0]:.3f} to {by[1]:.3f} higher."
    return f"Whether it needs the {one} or the {other} tokens more, these images do not say."


def table_of(result: dict[str, Any]) -> list[list[str]]:
    """What is printed: a line of headings, then one for each layer and kind of token."""
    change = "change (95 % interval)"
    lines = [["replaced by their mean", "tokens", "top-1 %", change, "loss", change]]
    lines.append(["nothing", "", f"{100 * result['top1']:.1f}", "", f"{result['loss']:.3f}", ""])
    for row in result["replaced"]:
        top1 = [f"{100 * row['top1']:.1f}", in_brackets(row["top1_change"], 100, 1)]
        loss = [f"{row['loss']:.3f}", in_brackets(row["loss_change"], 1, 3)]
        lines.append([row["layer"], row["tokens"], *top1, *loss])
    return lines


def in_brackets(change: dict[str, Any], scale: float, digits: int) -> str:
    """A change with its interval in brackets."""
    low_high = [f"{scale * end:+.{digits}f}" for end in change["ci95"] or ()]
    return f"{scale * change['mean']:+.{digits}f}" + (f" ({' to '.join(low_high)})" if low_high else "")


def draw(result: dict[str, Any], folder: Path) -> list[str]:
    """Attention by layer beside the tokens' shares, and the loss without them; gives the files' names."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_attention(left, result["attention"])
        draw_changes(right, result["replaced"])
        return write_figure(folder, "tokens", figure)


def draw_attention(axes: "Axes", layers: Sequence[dict[str, Any]]) -> None:
    """A line for each kind of token over the layers, and a dashed one for its share of the tokens."""
    names = [layer["layer"] for layer in layers]
    for source, colour in COLOURS.items():
        at = [i for i, layer in enumerate(layers) if source in layer["to"]]
        if not at:
            continue
        given = [layers[i]["to"][source] for i in at]
        axes.plot(at, [one["attention"]["mean"] for one in given], "o-", color=colour, label=f"to {source} tokens")
        axes.plot(at, [one["share_of_tokens"] for one in given], "--", color=colour, label="their share of the tokens")
    who = "CLS" if layers[0]["asks"] == "cls" else "the patches"
    axes.set(title=f"Attention of {who}", ylim=(0, 1.02), xticks=range(len(names)))
    axes.set_xticklabels(names, rotation=45, ha="right", fontsize=7)
    axes.legend(fontsize=8)


def draw_changes(axes: "Axes", rows: Sequence[dict[str, Any]]) -> None:
    """Bars of what the loss gains without each kind of token, by layer, with intervals."""
    layers, sources = list(dict.fromkeys(row["layer"] for row in rows)), dict.fromkeys(row["tokens"] for row in rows)
    for number, source in enumerate(sources):
        mine = [row for row in rows if row["tokens"] == source]
        at = [layers.index(row["layer"]) + 0.8 * ((number + 0.5) / len(sources) - 0.5) for row in mine]
        change = [row["loss_change"]["mean"] for row in mine]
        half = [(row["loss_change"]["ci95"] or [mean])[-1] - mean for row, mean in zip(mine, change, strict=True)]
        axes.bar(at, change, 0.8 / len(sources), yerr=half, color=COLOURS[source], label=f"{source} tokens")
    axes.axhline(0, color="grey", linewidth=0.7)
    axes.set(title="Loss with tokens replaced by their mean", ylabel="change of the loss", xticks=range(len(layers)))
    axes.set_xticklabels(layers, rotation=45, ha="right", fontsize=7)
    axes.legend(fontsize=8)
