"""Token fusion that starts from a linear classifier: what two trained parents know, and gated tokens on top of it.

A fusion head from random weights loses to a straight line on few images. So the straight line is the model's head from
the start, and what fuses adds to its logits through a gate: with the gate closed the model is the line, to the bit.

    S = (P, X)        what the parents see: tokens of the CNN's last two stages and of two of the transformer's layers
                      (the last and the one after five sixths, each normalised without weights), at the same places,
                      the finer kind averaged to the other's grid
    z = std([mean(P); X_cls; mean(X)])       their means without CLS, and CLS where there is one
    P, X = drop(std(P)), drop(std(X))        from here on the tokens, of which some are left out (zeros) while training,
                                              or all of one kind (branch dropout)
    t = 0.01 [P; X]                          all of them in a row: every token votes, by weights of its own place
    p, x = norm(A P) + e, norm(B X) + f      projected to one width, with learned places e and f
    (dx, dp) = op(x, p)                      a fusion operator
    u = norm([mean(p + dp); (x + dx)_cls; mean(x + dx)])

    logits = W z + b + T t + V(a u)          W, b and T linear classifiers' (`probe.py`), a = 0 at the start

    std(v) = (v - m) / s, channel by channel, m and s of the training images; each std and each norm is one of its own.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.layers.blocks import layer_norm
from tokenfusion.layers.positions import Grid, PositionTable
from tokenfusion.layers.tokens import TokenGroup, TokenLayout, map_to_tokens, size_of, tokens_to_map
from tokenfusion.models.backbones import CNNBackbone, TokenBackbone
from tokenfusion.models.base import at_least, linear_head, require_own_pooling
from tokenfusion.models.exchange import Gate, coarser, kept_of
from tokenfusion.models.fused_model import FusedModel
from tokenfusion.models.operators import Grids, Operator, regrid
from tokenfusion.models.token_fusion import added, require_fit

LARGEST = torch.finfo(torch.float16).max
"""What S is cut to: it is kept in half precision."""
VOTE_SCALE = 0.01
"""Scale of t, which has many times as many numbers as z: a step of one learning rate then moves the logits as much."""
TOKEN_DROP = 0.2
"""Share of the tokens that are left out while what fuses is trained."""


class Seen(NamedTuple):
    """What the parents see: pixel tokens (B, h·w, c), the transformer's (B, 1 + h·w, 2C), CLS first if it has one."""

    pixels: Tensor
    tokens: Tensor


class Sight(nn.Module):
    """S as it is: what looks at it, or replaces a part of it, does so here."""

    def forward(self, pixels: Tensor, tokens: Tensor) -> Seen:
        return Seen(pixels, tokens)


class ProbeFusion(FusedModel):
    """logits = W z + b + T t + V(a u): a linear classifier on both parents' means, and what their tokens add to it.

    The module's docstring has z, t and u; `meet` and `forward_head` are its lines.

    Args:
        cnn, vit, operator, **config: as in `FusedModel`; the transformer's own head is dropped.

    Raises:
        InputError: the operator does not fit the transformer.
    """

    def __init__(self, cnn: CNNBackbone, vit: TokenBackbone, operator: type[Operator], **config: Any) -> None:
        require_fit(type(self), operator, vit)
        super().__init__(cnn, vit, operator, **config)
        self.classes = vit.num_classes
        vit.reset_classifier(0)
        self.sight = Sight()
        depth = len(vit.blocks)
        self.read_layers = sorted({depth * 5 // 6 - 1, depth - 1} - {-1})
        self.prefix = int("cls" in vit.prefix)
        self.channels = sum(cnn.dims[-2:]), vit.dim * len(self.read_layers)
        grid = self.cells(self.img_size)
        self.pixel_source = TokenSource(self.channels[0], vit.dim, grid, prefix=0)
        self.token_source = TokenSource(self.channels[1], vit.dim, grid, self.prefix)
        self.standardize = Standardize(self.num_means)
        self.drop = nn.Dropout1d(TOKEN_DROP)
        self.operator = self.make_operator(one_way=False)
        self.norm = layer_norm(vit.dim)
        self.gate = Gate(((2 + self.prefix) * vit.dim,), self.initial_gate)
        self.add_heads()

    def add_heads(self) -> None:
        """New V, T, and W with b, for the classes that there are."""
        means, places, fused = self.widths
        self.read_fused = linear_head(fused, self.classes)
        self.votes = no_votes(places, self.classes)
        self.head = linear_head(means, self.classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to [z; t; a u]."""
        return self.meet(self.sight(*self.observe(images)), self.cells(size_of(images)))

    def observe(self, images: Tensor) -> Seen:
        """Images (B, in_chans, H, W) to S, which does not change while the parents are frozen.

        Tokens of the transformer are normalised without weights, so that no layer's outweigh another's in half
        precision.
        """
        size = size_of(images)
        cells = self.cells(size)
        pixels = torch.cat([pooled(feature_map.float(), cells) for feature_map in self.cnn.maps(images)[-2:]], dim=2)
        tokens, context = self.vit.embed(images)
        layers = []
        for index, block in enumerate(self.vit.blocks):
            tokens = self.vit.step(block, tokens, context)
            if index in self.read_layers:
                layers.append(F.layer_norm(tokens.float(), tokens.shape[-1:]))
        seen = torch.cat(layers, dim=2)
        patches = tokens_to_map(seen[:, len(self.vit.prefix) :], self.vit.grid(size))
        tokens = torch.cat([seen[:, : self.prefix], pooled(patches, cells)], dim=1)
        return Seen(pixels.clamp(-LARGEST, LARGEST), tokens)

    def meet(self, seen: Seen, cells: Grid) -> Tensor:
        """S, whose tokens stand on a grid of cells, to [z; t; a u]."""
        z = self.standardize(self.means(seen))
        for_tokens, for_pixels = self.branches_kept(seen.pixels)
        pixels = kept_of(self.drop(self.pixel_source.standardize(seen.pixels)), for_pixels)
        tokens = kept_of(self.drop(self.token_source.standardize(seen.tokens)), for_tokens)
        t = VOTE_SCALE * self.in_a_row(pixels, tokens, cells)
        p, x = self.pixel_source(pixels, cells), self.token_source(tokens, cells)
        dx, dp = self.run(self.operator, x, p, Grids(cells, cells))
        u = self.norm(torch.stack(self.summary(added(p, dp), x + dx), dim=1)).flatten(1)
        return torch.cat([z, t, self.gate(u)], dim=1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """[z; t; a u] to W z + b + T t + V(a u)."""
        if pre_logits or not self.num_classes:
            return features
        z, t, gated_u = torch.split(features, self.widths, dim=1)
        return self.head(z.contiguous()) + self.votes(t) + self.read_fused(gated_u)

    def summary(self, pixels: Tensor, tokens: Tensor) -> list[Tensor]:
        """Mean of the pixels (B, c), CLS where there is one and the mean of the patches, (B, C) each."""
        cls, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        return [pixels.mean(1), *cls.unbind(1), patches.mean(1)]

    def means(self, seen: Seen) -> Tensor:
        """What a linear classifier reads of S, in a row: (B, c + 2C), without CLS (B, c + C)."""
        return torch.cat(self.summary(*seen), dim=1)

    def in_a_row(self, pixels: Tensor, tokens: Tensor, cells: Grid) -> Tensor:
        """All tokens, (B, F), those of images of another size averaged to the places that votes are of."""
        own = self.cells(self.img_size)
        cls, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        parts = regrid(pixels, cells, own), cls, regrid(patches, cells, own)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

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
        votes = torch.zeros(()) if votes is None else votes / VOTE_SCALE
        self.votes.weight.copy_(votes)  # type: ignore[operator]
        self.set_gates(0.0)

    @property
    def reads(self) -> str:
        return "votes"

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.classes

    @property
    def num_means(self) -> int:
        """Numbers of z."""
        return self.channels[0] + (1 + self.prefix) * self.channels[1]

    @property
    def widths(self) -> list[int]:
        """Numbers of z, t and u."""
        return [self.num_means, self.row_length, self.gate.weight.numel()]

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return sum(self.widths)

    @property
    def head_hidden_size(self) -> int:  # type: ignore[override]
        return self.num_features

    def get_classifier(self) -> Any:
        """What reads z, t and u, as timm's distilled models give their two heads."""
        return self.head, self.votes, self.read_fused

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        require_own_pooling(global_pool, num_classes)
        at_least(0, num_classes=num_classes)
        self.classes = num_classes
        self.add_heads()
        for head in self.get_classifier():
            head.to(self.gate.weight.device, self.gate.weight.dtype).train(self.training)

    def part_of(self, parameter: str) -> str:
        return "head" if parameter.startswith("head.") else super().part_of(parameter)

    def operator_grids(self, size: Grid) -> dict[str, Grid]:
        return {"operator": self.cells(size)}

    def meeting_layout(self, size: Grid) -> TokenLayout:
        *others, patches = self.token_layout(size)
        return (*others[: self.prefix], TokenGroup(patches.source, self.cells(size)))

    def meetings(self, size: Grid) -> dict[str, tuple[TokenLayout, ...]]:
        met = super().meetings(size)
        return {"sight": met["operator"][::-1]} | met


def no_votes(numbers: int, num_classes: int) -> nn.Module:
    """A linear layer without a bias that starts as nothing; nothing for 0 classes."""
    if not num_classes:
        return nn.Identity()
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
    """Tokens projected to one width, normalised and placed; `meet` standardises them before.

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
