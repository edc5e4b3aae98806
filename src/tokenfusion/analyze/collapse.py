"""Whether attention collapses with depth: DeepViT's diagnosis (arXiv 2103.11886, section 3) of any model.

Blocks are compared where their maps have the same tokens and heads: such blocks form a group.
Letters: B batch, L blocks of a group, H heads, N query tokens, M key tokens, C channels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from tokenfusion.analyze.attention_metrics import (
    block_cosines,
    effective_rank,
    entropy,
    head_cosines,
    mean_distance,
    pairs_of,
    pixel_distances,
    repeating_runs,
    similar_blocks,
    token_similarity,
)
from tokenfusion.analyze.collapse_figures import feature_maps, write_figures
from tokenfusion.analyze.collapse_summary import collapse_summary, on_features
from tokenfusion.analyze.inputs import open_run_or_model, output_folder
from tokenfusion.analyze.record import AttentionRecord, attention_layouts, evaluating, record_attention
from tokenfusion.data.loader import eval_batches
from tokenfusion.errors import InputError
from tokenfusion.files import own_folder, write_json
from tokenfusion.formatting import Progress, unheard
from tokenfusion.hardware import keep_freed_memory
from tokenfusion.layers.tokens import AttentionLayout, TokenLayout, size_of

Group = tuple[AttentionLayout, int]
"""What blocks that can be compared have in common: layout and number of heads."""
BLOCK_THRESHOLD, HEAD_THRESHOLD = 0.8, 0.5
"""From where on the paper calls blocks, and heads of a block, similar."""
NEIGHBOURS = (1, 2, 3)
STEP_BYTES = 2**26
"""Maps of all blocks that are held at once, unless a single image has more."""
SAMPLE = 32
"""How many images the effective rank and the maps before mixing are looked at in, since they cost the most."""
PREPARED, PICTURES = 16, 3
"""Images that are prepared at once, and those whose feature maps are drawn."""
QUANTITIES = ("head_similarity", "similar_heads", "entropy", "distance_px", "token_similarity", "effective_rank")


def analyze_collapse(
    run_or_model: str,
    data: str | None = None,
    *,
    num_images: int = 256,
    out: Path | None = None,
    progress: Progress = unheard,
) -> tuple[dict[str, Any], Path]:
    """Measure a run or an untrained model on images; write `collapse.json` and figures.

    Args:
        run_or_model, data, num_images: as in `open_run_or_model`.
        out: folder to write to; RUN/collapse, or `collapse` for a model's name, when not given.
        progress: told of the images that are read, and then measured.

    Returns:
        what `collapse.json` holds (see `measure_collapse`), with `model`, `feature_maps` (the blocks that have some),
        `summary` and `figures`; and the folder.

    Raises:
        InputError: the model or the data cannot be used, or as in `measure_collapse`.
    """
    folder = output_folder(run_or_model, data, out, "collapse")
    classifier, images = open_run_or_model(run_or_model, data, num_images, partial(progress, "reading images"))
    keep_freed_memory()

    def batches() -> Iterator[Tensor]:
        for done, (batch, _) in enumerate(eval_batches(images, classifier.preprocess, batch_size=PREPARED)):
            yield classifier.to_input(batch)
            progress("measuring images", min((done + 1) * PREPARED, len(images)), len(images))

    result = {"model": classifier.name} | measure_collapse(classifier.model, batches())
    pictures = torch.stack([classifier.preprocess.resize(images[i]) for i in range(min(PICTURES, len(images)))])
    features = feature_maps(classifier.model, classifier.to_input(pictures))
    result["feature_maps"] = [found.block for found in features]
    result["summary"] = " ".join([collapse_summary(result), *on_features(result)])
    with own_folder(folder):
        result["figures"] = write_figures(result, folder, pictures, features)
        write_json(folder / "collapse.json", result)
    return result, folder


def watch_collapse(model: nn.Module, images: Tensor) -> dict[str, float]:
    """How far a model's attention has collapsed.

    Args:
        model: as in `measure_collapse`; it is left as it was.
        images: (B, in_chans, H, W) as it takes them.

    Returns:
        by name, the undefined left out: `collapse/neighbour_similarity`, of blocks next to each other;
        `collapse/similar_blocks`, the share of blocks that are like at least one other; `collapse/head_similarity` and
        `collapse/entropy`, means over blocks, the entropy in units of uniform attention's; behind the last block
        `collapse/token_similarity` and `collapse/effective_rank`.

    Raises:
        InputError: as in `measure_collapse`.
    """
    result = measure_collapse(model, [images])
    groups, blocks = result["groups"], result["blocks"]
    heads = [block["head_similarity"] for block in blocks if block["head_similarity"] is not None]
    last = next((block for block in reversed(blocks) if block["token_similarity"] is not None), None)
    values = {
        "neighbour_similarity": fmean(value for group in groups for value in group["neighbours"]["1"]),
        "similar_blocks": sum(len(group["similar_blocks"]) for group in groups)
        / sum(len(group["blocks"]) for group in groups),
        "head_similarity": fmean(heads) if heads else None,
        "entropy": fmean(block["entropy"] / block["uniform_entropy"] for block in blocks),
        "token_similarity": last["token_similarity"] if last else None,
        "effective_rank": last["effective_rank"] if last else None,
    }
    return {f"collapse/{name}": value for name, value in values.items() if value is not None}


@torch.no_grad()
def measure_collapse(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Any]:
    """Measure how alike the blocks' attention is, the heads' within a block, and the tokens behind each block.

    Similarity is of the maps that the values are multiplied by: the mixed ones where a block re-attends, and those
    before the mixing separately. Entropy and distance are of the maps after the softmax. In memory are the maps of all
    blocks for one image, or for as many as fit into 64 MiB: L·H·N·M·4 bytes an image, twice that with Re-attention.

    Args:
        model: as in `record_attention`; it is run in evaluation mode and in the arithmetic of the caller.
        batches: images (B, C, H, W) as the model takes them, all of one size.

    Returns:
        `images`, `sample` (how many of them, the first, what costs the most is of), `img_size`, `thresholds`;
        `groups`: for blocks with equal tokens and heads, in order: `similarity` (L, L), the mean over images, heads and
        tokens; `similarity_before_mixing` (L, L), of the sample, or None; `similar_share` (L, L), how many heads and
        tokens are more similar than 0.8; `neighbours` k = 1, 2, 3 apart; `previous_by_head` (H, L - 1);
        `similar_blocks`, those whose similarity to at least one other exceeds 0.8, and their share; `runs`, first and
        last of the consecutive blocks that are each similar to the one before;
        `blocks`: of each, `head_similarity`, `similar_heads` (share of pairs above 0.5), `entropy` in nats beside that
        of uniform attention, `distance_px`, `token_similarity`, `effective_rank` (of the sample); None where undefined;
        `not_compared`: blocks that no other has the tokens of.

    Raises:
        InputError: no attention that can be seen, fewer than 2 blocks to compare, no image, maps that are not finite.
    """
    collapse = Collapse()
    blocks = len(attention_layouts(model))
    if blocks < 2:
        raise InputError(f"the model has {blocks} block of attention; collapse compares 2 or more")
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        collapse.observe(model, batches, stack)
    result = collapse.result()
    if not result["groups"]:
        raise InputError("no two blocks of the model have the same tokens; collapse compares 2 or more such blocks")
    return result


class Collapse:
    """The quantities of a model, added up over images; `measure_collapse` is the way to use it."""

    def __init__(self) -> None:
        self.means = Means()
        self.groups: dict[Group, list[str]] = {}
        self.mixed: set[str] = set()
        self.distances: dict[AttentionLayout, Tensor] = {}
        self.img_size = (0, 0)
        self.images = 0

    def observe(self, model: nn.Module, batches: Iterable[Tensor], stack: ExitStack) -> None:
        """Run the model over batches, as many images at a time as `STEP_BYTES` allow."""
        records = stack.enter_context(record_attention(model, reduce=self.see_block))
        for name in records:
            block = model.get_submodule(name.rpartition(".")[0])
            stack.callback(block.register_forward_hook(partial(self.see_tokens, name)).remove)
        step = 1
        for batch in batches:
            if self.images and size_of(batch) != self.img_size:
                raise InputError(f"images of {size_of(batch)} follow some of {self.img_size}; give them one size")
            self.img_size = size_of(batch)
            while len(batch):
                images, batch = batch[:step], batch[step:]
                model(images)
                step = max(1, STEP_BYTES * len(images) // self.count_block_pairs(records))
                self.images += len(images)
        if not self.images:
            raise InputError("no image is given; collapse is measured on images")

    def see_block(self, record: AttentionRecord) -> tuple[Tensor, Tensor]:
        """Count what one block says alone; gives its map before and after mixing, to compare the blocks by."""
        name, layout, maps = record.name, record.layout, record.map
        if layout not in self.distances:
            self.distances[layout] = pixel_distances(layout, self.img_size).to(maps.device)
        if record.mixed is not None:
            self.mixed.add(name)
        pairs = pairs_of(head_cosines(record.applied))
        self.means.add((name, "head_similarity"), pairs.mean((1, 2)))
        self.means.add((name, "similar_heads"), (pairs > HEAD_THRESHOLD).float().mean((1, 2)))
        self.means.add((name, "entropy"), entropy(maps).mean((1, 2)))
        self.means.add((name, "distance_px"), mean_distance(maps, self.distances[layout]))
        return maps, record.applied

    def see_tokens(self, name: str, _block: nn.Module, _inputs: Any, output: Any) -> None:
        """Count what the tokens (B, N, C) say that a block gives."""
        if isinstance(output, Tensor) and output.ndim == 3 and output.shape[1] > 1:
            self.means.add((name, "token_similarity"), token_similarity(output))
            left = SAMPLE - self.means.counts.get((name, "effective_rank"), 0)
            if left > 0:
                self.means.add((name, "effective_rank"), effective_rank(output[:left]))

    def count_block_pairs(self, records: Mapping[str, AttentionRecord]) -> int:
        """Compare the blocks of each group after a forward pass and let their maps go; gives the bytes they took."""
        maps = {name: record.reduced.pop() for name, record in records.items()}
        self.groups = {}
        for name, (before, _) in maps.items():
            self.groups.setdefault((records[name].layout, before.shape[1]), []).append(name)
        for group, names in self.groups.items():
            if len(names) > 1:
                self.count_pairs(group, "applied", [maps[name][1] for name in names])
            if len(names) > 1 and self.mixed.intersection(names) and self.images < SAMPLE:
                left = SAMPLE - self.images
                self.count_pairs(group, "before_mixing", [maps[name][0][:left] for name in names])
        return sum(before.nbytes + (after is not before) * after.nbytes for before, after in maps.values())

    def count_pairs(self, group: Group, which: str, maps: Sequence[Tensor]) -> None:
        similarity = block_cosines(maps)  # (B, H, N, L, L)
        self.means.add((group, which), similarity.mean(2))
        self.means.add((group, which, "share"), (similarity > BLOCK_THRESHOLD).float().mean((1, 2)))

    def result(self) -> dict[str, Any]:
        """What was found, as numbers and lists."""
        blocks = [self.block_entry(name, *group) for group, names in self.groups.items() for name in names]
        groups = [self.group_entry(group, names) for group, names in self.groups.items() if len(names) > 1]
        return {
            "images": self.images,
            "sample": min(SAMPLE, self.images),
            "img_size": list(self.img_size),
            "thresholds": {"blocks": BLOCK_THRESHOLD, "heads": HEAD_THRESHOLD},
            "groups": groups,
            "not_compared": [names[0] for names in self.groups.values() if len(names) == 1],
            "blocks": blocks,
        }

    def block_entry(self, name: str, layout: AttentionLayout, heads: int) -> dict[str, Any]:
        keys = sum(group.count for group in layout.keys)
        known = {"name": name, "heads": heads, "re_attention": name in self.mixed, "uniform_entropy": log(keys)}
        return known | {quantity: self.means.number((name, quantity)) for quantity in QUANTITIES}

    def group_entry(self, group: Group, names: list[str]) -> dict[str, Any]:
        layout, _ = group
        by_head = self.means[group, "applied"]  # (H, L, L)
        similarity = by_head.mean(0)
        similar = similar_blocks(similarity, BLOCK_THRESHOLD)
        before = self.means[group, "before_mixing"].mean(0).tolist() if self.mixed.intersection(names) else None
        return {
            "blocks": names,
            "queries": layout_text(layout.queries),
            "keys": layout_text(layout.keys),
            "similarity": similarity.tolist(),
            "similarity_before_mixing": before,
            "similar_share": self.means[group, "applied", "share"].tolist(),
            "neighbours": {str(k): similarity.diagonal(k).tolist() for k in NEIGHBOURS if k < len(names)},
            "previous_by_head": by_head.diagonal(1, 1, 2).tolist(),
            "similar_blocks": [names[i] for i in similar],
            "share_of_similar_blocks": len(similar) / len(names),
            "runs": [list(run) for run in repeating_runs(similarity, BLOCK_THRESHOLD)],
        }


class Means:
    """Running means of tensors by name."""

    def __init__(self) -> None:
        self.totals: dict[Any, Tensor] = {}
        self.counts: dict[Any, int] = {}

    def add(self, key: Any, values: Tensor) -> None:
        """Count values (B, ...), of an image each."""
        self.totals[key] = self.totals.get(key, 0) + values.double().sum(0).cpu()
        self.counts[key] = self.counts.get(key, 0) + len(values)

    def __getitem__(self, key: Any) -> Tensor:
        return self.totals[key] / self.counts[key]

    def number(self, key: Any) -> float | None:
        """A mean as a number; None where nothing was counted, or where it is not defined."""
        value = float(self[key].mean()) if key in self.totals else float("nan")
        return value if value == value else None


def layout_text(tokens: TokenLayout) -> str:
    """A layout as text, such as "cls + patch 14×14"."""
    names = (f"{group.source} {group.grid[0]}×{group.grid[1]}" if group.grid else group.source for group in tokens)
    return " + ".join(names)
