"""Token Fusion: pixels of a CNN's feature map as tokens beside image patches, fused early, late or layer by layer.

Source: "Token Fusion", arXiv 2208.09183 (IEEE Access 2023). Only the abstract is at hand and no code was published, so
the widths and the fusion operators (`models/operators.py`) are this project's own.

The equations' symbols, the same in every strategy:

    X    the transformer's tokens, (B, T, C): CLS first, then patches      X <- blocks(X)      its blocks
    M    the CNN's feature map, (B, c, h, w)                               M_s = stage_s(M)    its stages, s = 1 .. S
    P    pixel tokens, (B, P, C): P = tokens(M)                            (dX, dP) = op(X, P) a fusion operator
         P = tokens(pool(M)) where M is finer than the patches
    a b  gates: 0 leaves either parent as it is alone                      W(P)                tokens back into the map

The head reads X + a mean(P). So that either side learns to answer alone, an image may be without its patches or its
pixels while training, which are 0 then (branch dropout), or each side may have a loss of its own beside that of both:

    L = l(head(finish(X + a mean(P)))) + w/2 [l(head(X°)) + l(head(finish(mean(P))))]     w falls to 0 while training

X° is what the transformer makes of the patches alone. `models/fused_model.py` has what explains a fused model,
`models/fuse.py` builds one.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.layers.intermediates import FeaturePoint
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import TokenLayout, size_of
from tokenfusion.models.backbones import CNNBackbone, TokenBackbone
from tokenfusion.models.base import at_least
from tokenfusion.models.exchange import Gate, PixelSource, ReadOut, WriteBack, coarser, kept_of
from tokenfusion.models.fused_model import FusedModel
from tokenfusion.models.operators import Grids, JointAttention, Operator

Fused = tuple[Tensor, Tensor, Any]
"""X (B, T, C), P (B, P, C) and the context of the transformer's blocks, of images whose tokens met."""


class TokenFusion(FusedModel):
    """What the strategies share: the transformer's head, and what it reads of both.

    Args:
        cnn, vit, operator, **config: as in `FusedModel`.

    Raises:
        InputError: the operator does not fit the strategy or the transformer (`REFUSALS`).
    """

    def __init__(self, cnn: CNNBackbone, vit: TokenBackbone, operator: type[Operator], **config: Any) -> None:
        require_fit(type(self), operator, vit)
        super().__init__(cnn, vit, operator, **config)
        self.readout = ReadOut(vit.dim, self.initial_gate)

    def forward_features(self, images: Tensor) -> Any:
        """finish(X + a mean(P)), which the transformer's own head reads."""
        tokens, pixels, context = self.fused_tokens(images)
        return self.vit.finish(self.readout(tokens, pixels), context)

    def fused_tokens(self, images: Tensor) -> Fused:
        """Images (B, in_chans, H, W) to X and P once they met, and the context of the transformer's blocks."""
        raise NotImplementedError

    def side_logits(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the logits of both sides, of the patches and of the pixels: (3, B, K).

        head(finish(X + a mean(P))), head(X°) and head(finish(mean(P))), X° being what the transformer makes of the
        patches alone, as with every gate closed; P may have met the patches.
        """
        tokens, pixels, context = self.fused_tokens(images)
        both = self.vit.finish(self.readout(tokens, pixels), context)
        pixels_alone = self.vit.finish(pixels.mean(dim=1, keepdim=True).expand_as(tokens), context)
        patches_alone = self.vit.forward_features(images)
        return torch.stack([self.forward_head(features) for features in (both, patches_alone, pixels_alone)])

    def embed(self, images: Tensor) -> tuple[Tensor, Any, Tensor | None]:
        """X, the context of the transformer's blocks, and which images keep their P, (B, 1, 1), if not all do."""
        tokens, context = self.vit.embed(images)
        patches, pixels = self.branches_kept(images)
        first = len(self.vit.prefix)
        if patches is not None:
            tokens = torch.cat([tokens[:, :first], kept_of(tokens[:, first:], patches)], dim=1)
        return tokens, context, pixels

    def feature_points(self) -> list[FeaturePoint]:
        """As of `FusedModel`, and at the readout (patch tokens)."""
        points = super().feature_points()
        return [*points, replace(points[-1], module="readout", output=None)]

    def gates(self) -> dict[str, str]:
        return {"readout.gate": "readout"}


class Exchange(nn.Module):
    """P = tokens(pool(M)),  (dX, dP) = op(X, P);  gives dX, P + dP and b W(P + dP).

    pool averages a map finer than the patches to their grid: attention among all pixels of an early stage would cost
    more than both parents together. An operator that writes nothing gives no update of M. The gate a is applied by the
    strategy, whose equation it stands in.

    Args:
        channels: channels of the map.
        operator: how the tokens meet.
        dim: width C of a token.
        grid: rows and columns of the pixel tokens that positions are learned on.
        gate: start of the gates.
    """

    def __init__(self, channels: int, operator: Operator, dim: int, grid: Grid, gate: float) -> None:
        super().__init__()
        self.source = PixelSource(channels, dim, grid)
        self.operator = operator
        self.gate = Gate((dim,), gate)
        self.write = WriteBack(dim, channels, gate) if operator.writes else None

    def forward(
        self, tokens: Tensor, feature_map: Tensor, patches: Grid, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """X (B, T, C), its patches on a grid, and M (B, channels, h, w), to dX, the new P, and M's update or None."""
        size = size_of(feature_map)
        grids = Grids(patches, coarser(size, patches))
        pixels = self.source(F.adaptive_avg_pool2d(feature_map, grids.pixels), kept)
        token_update, pixel_update = self.operator(tokens, pixels, grids)
        pixels = added(pixels, pixel_update)
        return token_update, pixels, self.write(pixels, grids.pixels, size) if self.write is not None else None


class EarlyFusion(TokenFusion):
    """P = tokens(pool(M_S)),  (dX, _) = op(X, P),  X <- blocks(X + a dX): the tokens meet at the entrance."""

    def __init__(self, cnn: CNNBackbone, vit: TokenBackbone, operator: type[Operator], **config: Any) -> None:
        super().__init__(cnn, vit, operator, **config)
        grid = self.map_grids(self.img_size)[-1]  # though pixels may stand on a coarser one: as saved runs have it
        self.exchange = Exchange(cnn.dims[-1], self.make_operator(one_way=True), vit.dim, grid, self.initial_gate)

    def operator_grids(self, size: Grid) -> dict[str, Grid]:
        return {"exchange.operator": coarser(self.map_grids(size)[-1], self.vit.grid(size))}

    def meetings(self, size: Grid) -> dict[str, tuple[TokenLayout, ...]]:
        return super().meetings(size) | self.block_layouts(size)

    def entrance(self, size: Grid) -> tuple[str, tuple[TokenLayout, ...]]:
        return "exchange", (self.token_layout(size),)

    def gates(self) -> dict[str, str]:
        return {"exchange.gate": "exchange"} | super().gates()

    def fused_tokens(self, images: Tensor) -> Fused:
        tokens, context, kept = self.embed(images)
        update, pixels, _ = self.run(self.exchange, tokens, self.cnn(images), self.vit.grid(size_of(images)), kept)
        tokens = self.vit.through(self.vit.blocks, tokens + self.exchange.gate(update), context)
        return tokens, pixels, context


class JointEarlyFusion(TokenFusion):
    """P = tokens(M_S),  [X; P] <- blocks([X; P]): the transformer's own blocks carry both kinds. Not gated."""

    joint = True

    def __init__(self, cnn: CNNBackbone, vit: TokenBackbone, operator: type[Operator], **config: Any) -> None:
        super().__init__(cnn, vit, operator, **config)
        self.pixel_source = PixelSource(cnn.dims[-1], vit.dim, self.map_grids(self.img_size)[-1])

    def operator_grids(self, size: Grid) -> dict[str, Grid]:  # noqa: ARG002
        return {}

    def meetings(self, size: Grid) -> dict[str, tuple[TokenLayout, ...]]:
        return self.block_layouts(size)

    def fused_tokens(self, images: Tensor) -> Fused:
        tokens, context, kept = self.embed(images)
        pixels = self.pixel_source(self.cnn(images), kept)
        both = self.vit.through(self.vit.blocks, torch.cat([tokens, pixels], dim=1), context)
        tokens, pixels = torch.split(both, [tokens.shape[1], pixels.shape[1]], dim=1)
        return tokens, pixels, context


class LateFusion(TokenFusion):
    """X <- blocks(X),  P = tokens(M_S);  (dX_i, dP_i) = op_i(X + Σ dX, P + Σ dP);  X <- X + a Σ_i dX_i.

    Each parent runs to its end, then operators i = 1 .. n bring the tokens together; the sums are over those before.

    Args:
        fusion_depth: operators n.
    """

    def __init__(
        self, cnn: CNNBackbone, vit: TokenBackbone, operator: type[Operator], *, fusion_depth: int = 2, **config: Any
    ) -> None:
        super().__init__(cnn, vit, operator, **config)
        at_least(1, fusion_depth=fusion_depth)
        self.pixel_source = PixelSource(cnn.dims[-1], vit.dim, self.map_grids(self.img_size)[-1])
        # after the last operator no other reads the pixels
        self.operators = nn.ModuleList(self.make_operator(one_way=i == fusion_depth - 1) for i in range(fusion_depth))
        self.gate = Gate((vit.dim,), self.initial_gate)

    def operator_grids(self, size: Grid) -> dict[str, Grid]:
        return {f"operators.{i}": self.map_grids(size)[-1] for i in range(len(self.operators))}

    def gates(self) -> dict[str, str]:
        return {"gate": "operators.0"} | super().gates()

    def fused_tokens(self, images: Tensor) -> Fused:
        feature_map = self.cnn(images)
        tokens, context, kept = self.embed(images)
        tokens = self.vit.through(self.vit.blocks, tokens, context)
        pixels, update = self.pixel_source(feature_map, kept), None
        grids = Grids(self.vit.grid(size_of(images)), size_of(feature_map))
        for operator in self.operators:
            token_update, pixel_update = self.run(operator, added(tokens, update), pixels, grids)
            update, pixels = added(token_update, update), added(pixels, pixel_update)
        return tokens + self.gate(update), pixels, context


class LayerwiseFusion(TokenFusion):
    """For s = 1 .. S:  M_s = stage_s(M_{s-1}),  P_s = tokens(pool(M_s)),  (dX, dP) = op_s(X, P_s),
    X <- blocks_s(X + a_s dX),  M_s <- M_s + b_s W(P_s + dP): the two exchange tokens after every stage of the CNN.

    Nothing is written back into the last stage's map, nor into those of a CNN that gives all its maps at once.
    The transformer's blocks are spread over S groups, the first of which follows the first exchange, so that a group
    and the next stage see each other's last.
    """

    def __init__(self, cnn: CNNBackbone, vit: TokenBackbone, operator: type[Operator], **config: Any) -> None:
        super().__init__(cnn, vit, operator, **config)
        stages, depth = len(cnn.dims), len(vit.blocks)
        if depth < stages:
            raise InputError(
                f"{depth} blocks do not spread over {stages} stages of the CNN; take a deeper transformer, "
                f"or a CNN of {depth} stages"
            )
        self.cuts = [depth * i // stages for i in range(stages + 1)]
        patches = vit.grid(self.img_size)
        self.exchanges = nn.ModuleList(
            Exchange(
                channels,
                self.make_operator(one_way=not cnn.two_way or i == stages - 1),  # whose map nobody reads afterwards
                vit.dim,
                coarser(grid, patches),
                self.initial_gate,
            )
            for i, (channels, grid) in enumerate(zip(cnn.dims, self.map_grids(self.img_size), strict=True))
        )

    def operator_grids(self, size: Grid) -> dict[str, Grid]:
        patches = self.vit.grid(size)
        return {f"exchanges.{i}.operator": coarser(grid, patches) for i, grid in enumerate(self.map_grids(size))}

    def entrance(self, size: Grid) -> tuple[str, tuple[TokenLayout, ...]]:
        return "exchanges.0", (self.token_layout(size),)

    def gates(self) -> dict[str, str]:
        return {f"exchanges.{i}.gate": f"exchanges.{i}" for i in range(len(self.exchanges))} | super().gates()

    def fused_tokens(self, images: Tensor) -> Fused:
        grid = self.vit.grid(size_of(images))
        tokens, context, kept = self.embed(images)
        feature_map, maps = self.cnn.start(images)
        for s, (exchange, (start, stop)) in enumerate(zip(self.exchanges, pairwise(self.cuts), strict=True)):
            feature_map = self.cnn.stage(s, feature_map, maps)
            update, pixels, map_update = self.run(exchange, tokens, feature_map, grid, kept)
            tokens = self.vit.through(self.vit.blocks[start:stop], tokens + exchange.gate(update), context)  # type: ignore[operator]
            feature_map = added(feature_map, map_update)
        return tokens, pixels, context


def added(tokens: Tensor, update: Tensor | None) -> Tensor:
    """Tokens with an update, where there is one."""
    return tokens if update is None else tokens + update


Strategy = type[FusedModel]
STRATEGIES: dict[str, Strategy] = {"late": LateFusion, "early": EarlyFusion, "layerwise": LayerwiseFusion}


def strategy_class(strategy: Strategy, operator: type[Operator]) -> Strategy:
    """The class that fuses by a strategy with an operator."""
    return JointEarlyFusion if (strategy, operator) == (EarlyFusion, JointAttention) else strategy


REFUSALS: tuple[tuple[Strategy, Callable[[type[Operator], TokenBackbone], bool], str], ...] = (
    (
        FusedModel,
        lambda operator, vit: operator.needs not in ("", *vit.prefix),
        "the transformer has no {operator.needs} token",
    ),
    (
        EarlyFusion,
        lambda operator, _: operator.updates == ("cls",),
        "at the entrance CLS is the same for every image, and so is what it attends to",
    ),
    (
        JointEarlyFusion,
        lambda _, vit: bool(vit.rigid),
        "no pixel tokens can pass through the transformer's blocks, since {vit.rigid}",
    ),
    (
        LateFusion,
        lambda operator, vit: vit.reads not in operator.updates,
        "the head reads {vit.reads} tokens, and behind the last block they never see what others are told",
    ),
)
"""What does not fit: the strategy, when, by operator and transformer, and why."""


def require_fit(strategy: Strategy, operator: type[Operator], vit: TokenBackbone) -> None:
    """Refuse an operator that does not fit a strategy and a transformer."""
    for kind, unfit, reason in REFUSALS:
        if issubclass(strategy, kind) and unfit(operator, vit):
            why = reason.format(operator=operator, vit=vit)
            raise InputError(f"{operator.__name__} does not fit {strategy.__name__}: {why}; take another operator")
