"""Token fusion that starts from a linear classifier: what two trained parents know, and gated tokens on top of it.

A fusion head from random weights loses to a straight line on few images. So the straight line is the model's head from
the start, and what fuses adds to its logits through a gate: with the gate closed the model is the line, to the bit.

    S = (P, X)   what the parents see: tokens of the CNN's last stages and of two of the transformer's layers,
                 at the same places, the finer kind averaged to the other's grid
    z            means of S, and CLS, each channel standardised
    t            S itself, each channel standardised: every token votes, by weights of its own place
    (dX, dP)     op(X, P), a fusion operator on the standardised tokens, projected to one width
    u            means of X + dX and of P + dP, and CLS

    logits = W z + b + T t + V(a u),   W, b and T linear classifiers' (`probe.py`), a = 0 at the start
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.layers.blocks import layer_norm
from tokenfusion.layers.intermediates import FeaturePoint
from tokenfusion.layers.positions import Grid, PositionTable
from tokenfusion.layers.tokens import TokenGroup, TokenLayout, map_to_tokens, size_of, tokens_to_map
from tokenfusion.models.backbones import CNNBackbone, TokenBackbone
from tokenfusion.models.base import linear_head
from tokenfusion.models.exchange import Gate, coarser
from tokenfusion.models.operators import Grids, Operator, regrid
from tokenfusion.models.token_fusion import TokenFusion, added

HALF = torch.finfo(torch.float16).max
VOTE_SCALE = 0.01
"""Of t, which has many times as many numbers as z: a step of one learning rate then moves the logits as much."""
TOKEN_DROP = 0.2
"""Share of the tokens that are left out while what fuses is trained."""


class Seen(NamedTuple):
    """What the parents see: pixel tokens (B, h·w, c), the transformer's (B, 1 + h·w, 2C), CLS first if it has one."""

    pixels: Tensor
    tokens: Tensor


class Sight(nn.Module):
    """S as it is: what looks at it, or replaces a part of it, does so here."""

    def forward(self, tokens: Tensor, pixels: Tensor) -> Seen:
        return Seen(pixels, tokens)


class ProbeFusion(TokenFusion):
    """logits = W z + b + T t + V(a u): a linear classifier on both parents' means, and what their tokens add to it.

    Args:
        cnn, vit, operator, **config: as in `TokenFusion`; the transformer's own head is dropped.
    """

    def __init__(self, cnn: CNNBackbone, vit: TokenBackbone, operator: type[Operator], **config: Any) -> None:
        super().__init__(cnn, vit, operator, **config)
        self.classes = vit.num_classes
        vit.reset_classifier(0)
        del self.readout  # the head reads means
        self.sight = Sight()
        depth = len(vit.blocks)
        self.read_layers = sorted({depth * 5 // 6 - 1, depth - 1} - {-1})
        self.prefix = int("cls" in vit.prefix)
        self.channels = sum(cnn.dims[-2:]), vit.dim * len(self.read_layers)
        grid = self.cells(self.img_size)
        self.pixel_source = TokenSource(self.channels[0], vit.dim, grid, prefix=0)
        self.token_source = TokenSource(self.channels[1], vit.dim, grid, self.prefix)
        self.standardize = Standardize(self.num_features)
        self.drop = nn.Dropout1d(TOKEN_DROP)
        self.operator = self.make_operator(one_way=False)
        groups = 2 + self.prefix
        self.norm = layer_norm(vit.dim)
        self.gate = Gate((groups * vit.dim,), self.initial_gate)
        self.read_fused = linear_head(groups * vit.dim, self.classes)
        self.votes = no_votes(self.row_length, self.classes)
        self.head = linear_head(self.num_features, self.classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to [z; t; a u]."""
        pixels, tokens = self.observe(images)
        return self.meet(self.sight(tokens, pixels), self.cells(size_of(images)))

    def observe(self, images: Tensor) -> Seen:
        """Images (B, in_chans, H, W) to S, which does not change while the parents are frozen.

        Tokens of the transformer are normalised without weights, so that no layer's outweigh another's in half
        precision.
        """
        size = size_of(images)
        cells = self.cells(size)
        tokens, context = self.vit.embed(images)
        layers = []
        for index, block in enumerate(self.vit.blocks):
            tokens = self.vit.step(block, tokens, context)
            if index in self.read_layers:
                layers.append(F.layer_norm(tokens.float(), tokens.shape[-1:]))
        seen = torch.cat(layers, dim=2)
        patches = tokens_to_map(seen[:, len(self.vit.prefix) :], self.vit.grid(size))
        tokens = torch.cat([seen[:, : self.prefix], pooled(patches, cells)], dim=1)
        pixels = torch.cat([pooled(feature_map.float(), cells) for feature_map in self.cnn.maps(images)[-2:]], dim=2)
        return Seen(pixels.clamp(-HALF, HALF), tokens)

    def meet(self, seen: Seen, cells: Grid) -> Tensor:
        """S, whose tokens stand on a grid of cells, to [z; t; a u]."""
        means = self.standardize(self.means(seen))
        sources = self.pixel_source, self.token_source
        pixels, tokens = (self.drop(source.standardize(part)) for source, part in zip(sources, seen, strict=True))
        placed = self.in_places(Seen(pixels, tokens), cells)
        pixels, tokens = self.pixel_source(pixels, cells), self.token_source(tokens, cells)
        token_update, pixel_update = self.run(self.operator, tokens, pixels, Grids(cells, cells))
        fused = self.norm(self.groups(Seen(added(pixels, pixel_update), tokens + token_update)))
        return torch.cat([means, placed, self.gate(fused.flatten(1))], dim=1)

    def in_places(self, seen: Seen, cells: Grid) -> Tensor:
        """Tokens in a row, (B, F), those of images of another size averaged to the places that votes are of."""
        own = self.cells(self.img_size)
        cls, patches = seen.tokens[:, : self.prefix], seen.tokens[:, self.prefix :]
        parts = regrid(seen.pixels, cells, own), cls, regrid(patches, cells, own)
        return VOTE_SCALE * torch.cat([part.flatten(1) for part in parts], dim=1)

    def groups(self, seen: Seen) -> Tensor:
        """Mean of the pixels, CLS where there is one, and the mean of the patches: (B, 2 or 3, C)."""
        cls, patches = seen.tokens[:, : self.prefix], seen.tokens[:, self.prefix :]
        return torch.cat([seen.pixels.mean(1, keepdim=True), cls, patches.mean(1, keepdim=True)], dim=1)

    def means(self, seen: Seen) -> Tensor:
        """What a linear classifier reads of S: the CNN's mean, then CLS and the mean of the patches."""
        cls, patches = seen.tokens[:, : self.prefix], seen.tokens[:, self.prefix :]
        return torch.cat([seen.pixels.mean(1), cls.flatten(1), patches.mean(1)], dim=1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return features
        ends = [self.num_features, self.num_features + self.row_length]
        means, placed, fused = features.tensor_split(ends, dim=1)
        return self.head(means.contiguous()) + self.votes(placed) + self.read_fused(fused)

    def decide(self, rows: Tensor) -> Tensor:
        """What `keep` made of images, (B, F), to logits."""
        return self.forward_head(self.meet(self.recall(rows), self.cells(self.img_size)))

    def keep(self, images: Tensor) -> Tensor:
        """S of images of the model's own size, as rows (B, F)."""
        return torch.cat([part.flatten(1) for part in self.observe(images)], dim=1)

    def recall(self, rows: Tensor) -> Seen:
        """S of rows (B, F)."""
        height, width = self.cells(self.img_size)
        pixels, tokens = rows.tensor_split([height * width * self.channels[0]], dim=1)
        return Seen(*(part.reshape(len(rows), -1, c) for part, c in zip((pixels, tokens), self.channels, strict=True)))

    @property
    def row_length(self) -> int:
        """Numbers F that are kept of an image."""
        height, width = self.cells(self.img_size)
        return height * width * sum(self.channels) + self.prefix * self.channels[1]

    def cells(self, size: Grid) -> Grid:
        """Rows and columns of the places at which both kinds of tokens stand, for images (H, W)."""
        return coarser(self.map_grids(size)[-1], self.vit.grid(size))

    @torch.no_grad()
    def start_from(self, weight: Tensor, bias: Tensor, votes: Tensor | None) -> None:
        """Make the head a linear classifier's, and close the gate.

        Args:
            weight, bias: W (K, F) and b (K,), of standardised means.
            votes: (K, F) of standardised tokens in a row, by which they vote; None for none.
        """
        self.head.weight.copy_(weight)  # type: ignore[operator]
        self.head.bias.copy_(bias)  # type: ignore[operator]
        self.votes.weight.copy_(torch.zeros_like(self.votes.weight) if votes is None else votes / VOTE_SCALE)
        self.set_gates(0.0)

    @property
    def reads(self) -> str:
        return "votes"

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.classes

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return self.channels[0] + (1 + self.prefix) * self.channels[1]

    @property
    def head_hidden_size(self) -> int:  # type: ignore[override]
        return self.num_features + self.row_length + self.gate.weight.numel()

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:  # noqa: ARG002
        self.classes = num_classes
        self.head = linear_head(self.num_features, num_classes)
        self.read_fused = linear_head(self.gate.weight.numel(), num_classes)
        self.votes = no_votes(self.row_length, num_classes)

    def part_of(self, parameter: str) -> str:
        return "head" if parameter.startswith("head.") else super().part_of(parameter)

    def feature_points(self) -> list[FeaturePoint]:
        return [point for point in super().feature_points() if point.module != "readout"]

    def operator_grids(self, size: Grid) -> dict[str, Grid]:
        return {"operator": self.cells(size)}

    def meeting_layout(self, size: Grid) -> TokenLayout:
        *others, patches = self.token_layout(size)
        return (*others[: self.prefix], TokenGroup(patches.source, self.cells(size)))

    def meetings(self, size: Grid) -> dict[str, tuple[TokenLayout, ...]]:
        met = super().meetings(size)
        return {"sight": met["operator"]} | met

    def gates(self) -> dict[str, str]:
        return {}


def no_votes(numbers: int, num_classes: int) -> nn.Linear:
    """A linear layer without a bias that starts as nothing."""
    votes = nn.Linear(numbers, num_classes, bias=False)
    nn.init.zeros_(votes.weight)
    return votes


class Standardize(nn.Module):
    """(x - mean) / std, channel by channel, as the training images have them; a channel that never varies gives 0."""

    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Take mean and standard deviation from values (..., C), batch by batch."""
        sums, count = torch.zeros(2, len(self.mean), dtype=torch.float64, device=self.mean.device), 0
        for batch in batches:
            values = batch.reshape(-1, len(self.mean)).double()
            sums += torch.stack([values.sum(0), values.square().sum(0)])
            count += len(values)
        mean, square = sums / count
        std = (square - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(std > 1e-6, 1 / std.clamp(min=1e-6), 0.0))

    def forward(self, values: Tensor) -> Tensor:
        """(..., C) to the same shape."""
        return (values - self.mean) * self.scale


class TokenSource(nn.Module):
    """Standardised tokens, projected to one width, normalised and placed.

    Args:
        channels: of a token as it was seen.
        dim: width C of the result.
        grid: rows and columns that places are learned on.
        prefix: tokens before those that have a place.
    """

    def __init__(self, channels: int, dim: int, grid: Grid, prefix: int) -> None:
        super().__init__()
        self.standardize = Standardize(channels)
        self.proj = nn.Linear(channels, dim)
        self.norm = nn.LayerNorm(dim)
        self.positions = PositionTable(dim, grid, prefix)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, T, channels) to (B, T, C)."""
        return self.norm(self.proj(tokens)) + self.positions(grid)


def pooled(feature_map: Tensor, cells: Grid) -> Tensor:
    """A map (B, C, h, w) as tokens, means over the cells of a coarser grid: (B, h'·w', C)."""
    return map_to_tokens(F.adaptive_avg_pool2d(feature_map, cells))
