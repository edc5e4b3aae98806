"""Attention rollout: how much of what the head reads comes from each token that entered (Abnar and Zuidema, 2020).

Source: arXiv 2005.00928, section 3: heads averaged, half of every layer's weight to its residual, layers multiplied.
Beyond it, for several streams of tokens: attention whose queries and keys differ mixes their rows alone; tokens that
are added at the same place count half each, as residual and update do; a gate weighs what was with what came.
Re-attention counts by its maps before the mixing, whose rows are shares.

Letters: B batch, H heads, N query tokens, M key tokens, S tokens that entered, h w grid.
"""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.analyze.record import AttentionRecord, attention_layouts, evaluating, record_attention
from tokenfusion.errors import InputError
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, TokenLayout, size_of
from tokenfusion.models.adapters import as_transformer
from tokenfusion.models.exchange import Gate, PixelSource
from tokenfusion.models.fused_model import FusedModel
from tokenfusion.models.operators import Grids, Operator


class Origin(NamedTuple):
    """Tokens that entered the model together: their source, their grid, and their columns in the rollout."""

    source: str
    grid: tuple[int, int] | None
    start: int
    stop: int


class Rollout:
    """What the tokens of each source are made of, followed through one forward pass.

    Attributes:
        origins: the tokens that entered, in the order of the columns.
        state: by source, what each of its tokens is made of: (B, tokens, S), rows that sum to 1.

    Args:
        reads_cls: whether the head reads CLS where there is one, rather than the mean of the patches.
    """

    def __init__(self, reads_cls: bool = True) -> None:
        self.read = (("cls", "dist"), ("patch",)) if reads_cls else (("patch",),)
        self.origins: list[Origin] = []
        self.state: dict[str, Tensor] = {}
        self.around = ""
        self.before: Mapping[str, Tensor] = {}

    def enter(self, tokens: TokenLayout, batch: int) -> None:
        """Let those of some tokens enter that have not yet, each made of itself alone."""
        for source, groups in by_source(tokens).items():
            if source in self.state:
                continue
            count = sum(group.count for group in groups)
            start = sum(origin.stop - origin.start for origin in self.origins)
            self.origins.append(Origin(source, groups[0].grid, start, start + count))
            self.state = {name: F.pad(rows, (0, count)) for name, rows in self.state.items()}
            self.state[source] = F.pad(torch.eye(count), (start, 0)).expand(batch, -1, -1)

    def follow(self, around: str, layout: AttentionLayout, maps: Tensor) -> None:
        """A layer with its residual: queries become half themselves, half what they attend to.

        Args:
            around: name of the module that the attention is a part of; its attentions all see what it was given.
            layout: what the rows and columns are.
            maps: (B, N, M), rows that sum to 1.
        """
        self.enter(layout.queries, len(maps))
        self.enter(layout.keys, len(maps))
        if around != self.around:
            self.around, self.before = around, dict(self.state)
        queries, keys = by_source(layout.queries), by_source(layout.keys)
        read = torch.cat([self.before[source] for source in keys], dim=1)
        own = torch.cat([self.state[source] for source in queries], dim=1)
        mixed = (own + maps.float().cpu() @ read) / 2
        counts = [sum(group.count for group in groups) for groups in queries.values()]
        self.state |= dict(zip(queries, torch.split(mixed, counts, dim=1), strict=True))

    def see(self, record: AttentionRecord) -> None:
        """Follow a recorded map, the mean over its heads; of learned queries their mean, which CLS is told."""
        layout, maps = record.layout, record.map.mean(1)
        if layout.queries[0].source == "query":
            layout, maps = AttentionLayout(layout.keys[:1], layout.keys), maps.mean(1, keepdim=True)
        self.follow(record.name.rpartition(".")[0], layout, maps)

    def head(self) -> Tensor:
        """What the head reads is made of, (B, S): CLS, the mean of several (with DeiT's "dist"), or of patches."""
        found = ([rows for source, rows in self.state.items() if source.endswith(kinds)] for kinds in self.read)
        return torch.stack([rows.mean(1) for rows in next(filter(None, found))]).mean(0)

    def shares(self) -> dict[str, Tensor]:
        """What the head reads, by source: (B,) each, which sum to 1."""
        head, shares = self.head(), dict[str, Tensor]()
        for origin in self.origins:
            part = head[:, origin.start : origin.stop].sum(1)
            shares[origin.source] = shares.get(origin.source, 0) + part
        return shares

    def maps(self) -> dict[str, Tensor]:
        """What the head reads, by source and place: (B, h, w) each; several grids of a source on the finest one."""
        head, found = self.head(), dict[str, list[Tensor]]()
        for origin in self.origins:
            if origin.grid:
                places = head[:, origin.start : origin.stop].reshape(-1, *origin.grid)
                found.setdefault(origin.source, []).append(places)
        return {source: on_finest(maps) for source, maps in found.items()}


def by_source(tokens: TokenLayout) -> dict[str, list[TokenGroup]]:
    """The groups of each source, in order; groups of a source follow each other."""
    groups: dict[str, list[TokenGroup]] = {}
    for group in tokens:
        groups.setdefault(group.source, []).append(group)
    return groups


def on_finest(maps: list[Tensor]) -> Tensor:
    """The sum of maps (B, h, w) on the finest of their grids; each keeps its total, up to interpolation."""
    finest = max((one.shape[1:] for one in maps), key=lambda grid: grid.numel())
    resized = [
        F.interpolate(one[:, None], size=finest, mode="bilinear")[:, 0] * (one.shape[1:].numel() / finest.numel())
        for one in maps
    ]
    return torch.stack(resized).sum(0)


@torch.no_grad()
def attention_rollout(model: nn.Module, images: Tensor) -> Rollout:
    """Follow images (B, in_chans, H, W) through a model.

    Raises:
        InputError: as in `require_followed`.
    """
    size = size_of(images)
    require_followed(model, size)
    rollout = Rollout(head_reads(model) == "cls")
    with evaluating(model), record_attention(model, reduce=rollout.see), ExitStack() as stack:
        if isinstance(model, FusedModel):
            rollout.enter(model.token_layout(size), len(images))
            follow_fusion(rollout, model, size, stack)
        model(images)
    return rollout


def require_followed(model: nn.Module, size: tuple[int, int]) -> None:
    """Refuse a model that rollout cannot follow, for images (H, W).

    Raises:
        InputError: no attention that can be seen; tokens that do not stay the same on the way; an operator that neither
            attends nor adds shares of tokens; a head that weighs every token for each class by itself.
    """
    name, layouts, reason = type(model).__name__, attention_layouts(model, size), ""
    if any(group.source == "pooled" for layout in layouts.values() for group in layout.keys):
        reason = "its keys stand for cells of patches, and convolutions between its stages mix places"
    if isinstance(model, FusedModel):
        if model.reads == "votes":
            reason = "its head weighs every token anew for each class, which are no shares"
        for operator, pixels in model.operator_grids(size).items():
            module: Any = model.get_submodule(operator)
            attends = any(attention.startswith(f"{operator}.") for attention in layouts)
            if not attends and module.shares(Grids(pixels, pixels))[0] is None:
                name, reason = type(module).__name__, "it has no attention"
    if reason:
        raise InputError(f"rollout cannot follow a {name}: {reason}; take --method gradcam")


def head_reads(model: nn.Module) -> str:
    """What a model's head reads; CLS where its transformer is of an unknown kind."""
    with suppress(InputError):
        return model.reads if isinstance(model, FusedModel) else as_transformer(model).reads
    return "cls"


def follow_fusion(rollout: Rollout, model: FusedModel, size: tuple[int, int], stack: ExitStack) -> None:
    """Hook what no attention map tells of: pixels that enter, tokens that are added, and gates."""
    patches = model.token_layout(size)[-1:]
    alone: dict[str, Tensor] = {}

    def begin(_module: nn.Module, _inputs: Any) -> None:
        alone.clear()
        alone.update(rollout.state)

    def anew(_module: nn.Module, _inputs: Any) -> None:
        rollout.state.pop("pixel", None)  # the next stage's pixels are other tokens

    def add(module: Operator, inputs: tuple[Tensor, Tensor, Grids], _output: Any) -> None:
        pixels, of_pixels = (TokenGroup("pixel", inputs[2].pixels),), module.shares(inputs[2])
        ways = AttentionLayout(patches, pixels), AttentionLayout(pixels, patches)
        for layout, shares in zip(ways, of_pixels, strict=True):
            if shares is not None:
                rollout.follow(f"addition {id(module)}", layout, shares.expand(len(inputs[0]), -1, -1))

    def weigh(module: Gate, _inputs: Any, _output: Any) -> None:
        opening = module.weight.detach().clamp(0, 1).mean().item()
        for source in alone.keys() - {"pixel"}:
            rows = F.pad(alone[source], (0, rollout.state[source].shape[2] - alone[source].shape[2]))
            rollout.state[source] = torch.lerp(rows, rollout.state[source], opening)

    def read_out(_module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        tokens, pixels = model.token_layout(size), rollout.state["pixel"].shape[1]
        means = torch.full((len(inputs[0]), sum(group.count for group in tokens), pixels), 1 / pixels)
        rollout.follow("readout", AttentionLayout(tokens, (TokenGroup("pixel", (1, pixels)),)), means)

    for gate, before in model.gates().items():
        stack.callback(model.get_submodule(before).register_forward_pre_hook(begin).remove)
        stack.callback(model.get_submodule(gate).register_forward_hook(weigh).remove)
    stack.callback(model.get_submodule("readout.gate").register_forward_pre_hook(read_out).remove)
    for module in model.modules():
        if isinstance(module, PixelSource):
            stack.callback(module.register_forward_pre_hook(anew).remove)
    for operator in model.operator_grids(size):
        stack.callback(model.get_submodule(operator).register_forward_hook(add).remove)
