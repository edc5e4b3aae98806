"""Token Fusion: pixels of a CNN's feature map as tokens beside image patches, fused early, late or layer by layer.

Source: "Token Fusion", arXiv 2208.09183 (IEEE Access 2023). Only the abstract is at hand and no code was published, so
the widths and the fusion operators (`models/operators.py`) are this project's own.

Any CNN that `models/stages.py` can walk and any transformer that `models/walks.py` can are fused by `models/fuse.py`;
`models/presets.py` holds the presets.

Letters: B batch, T tokens of the transformer (CLS first, then patches), M pixel tokens, C channels, h w grid.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.layers.intermediates import FeaturePoint
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, TokenLayout, size_of
from tokenfusion.models.base import PaperModel, at_least, choose, image_size
from tokenfusion.models.exchange import Exchange, Gate, PixelSource, coarser
from tokenfusion.models.operators import AlignedAddition, ClsAttention, Grids, JointAttention, Operator
from tokenfusion.models.stages import CNN, OneWayCNN, map_shapes
from tokenfusion.models.walks import walk_transformer

PARENTS = ("cnn", "vit")


class TokenFusion(PaperModel):
    """What the three strategies share: a CNN, a transformer whose blocks they walk, and its own end and head.

    Args:
        cnn: as `walk_cnn` gives it.
        vit: a transformer that `walk_transformer` can walk, with its head.
        operator: class of the fusion operator.
        img_size: height and width that position tables of pixels are made for; `forward` takes any other that the
            transformer takes.
        in_chans: channels of the images.
        gate: start of the gates that fused tokens pass: 0 leaves the transformer as it is alone.
        mlp_ratio: of the operators' MLPs, where they have one.
    """

    cnn: CNN

    def __init__(
        self,
        cnn: CNN,
        vit: nn.Module,
        operator: type[Operator],
        *,
        img_size: int | tuple[int, int],
        in_chans: int = 3,
        gate: float = 0.0,
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        self.walk = walk_transformer(vit)
        if reason := self.refusal(operator):
            raise InputError(f"{operator.__name__} does not fit {type(self).__name__}: {reason}; take another operator")
        self.cnn, self.vit = cnn, vit
        self.img_size, self.in_chans = image_size(img_size), in_chans
        self.frozen: tuple[str, ...] = ()
        self.make = partial(operator, self.walk.dim, self.walk.heads, mlp_ratio)
        self.initial_gate = gate
        self.readout_gate = Gate((self.walk.dim,), gate)
        self.rescale: nn.Module = nn.Identity()

    def refusal(self, operator: type[Operator]) -> str:
        """Why an operator does not fit this strategy and this transformer; "" where it does."""
        if operator is ClsAttention and "cls" not in self.walk.prefix:
            return "the transformer has no CLS token"
        return ""

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.vit.num_classes  # type: ignore[return-value]

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return self.vit.num_features  # type: ignore[return-value]

    @property
    def head_hidden_size(self) -> int:  # type: ignore[override]
        return self.vit.head_hidden_size  # type: ignore[return-value]

    def map_grids(self, size: Grid) -> list[Grid]:
        """Rows and columns of the CNN's maps for images (H, W)."""
        grids = map_shapes(self.cnn, size, self.in_chans)
        if isinstance(grids, str):
            raise InputError(f"the CNN gives no maps for images of {size[0]}×{size[1]}: {grids}; give a larger size")
        return grids

    def walk_cnn(self, images: Tensor) -> Tensor:
        """The CNN's last map of images (B, in_chans, H, W)."""
        images = self.rescale(images)
        if isinstance(self.cnn, OneWayCNN):
            return self.cnn(images)
        feature_map = self.cnn.stem(images)
        for stage in self.cnn.stages:
            feature_map = self.run(stage, feature_map)
        return feature_map

    def walk_blocks(self, blocks: Sequence[nn.Module], tokens: Tensor, others: Any) -> tuple[Tensor, Any]:
        """Tokens (B, T, C) through some of the transformer's blocks."""
        for block in blocks:
            tokens, others = self.walk.step(self.run, block, tokens, others)
        return tokens, others

    def read_out(self, tokens: Tensor, pixels: Tensor, others: Any) -> Any:
        """What the head reads: the transformer's tokens (B, T, C), with the mean of the pixels (B, M, C) added.

        A short way from the CNN to the head: training would else have to bring the transformer to life first.
        """
        tokens = self.readout_gate(tokens, tokens + pixels.mean(dim=1, keepdim=True))
        return self.walk.finish(self.vit, tokens, others)

    def forward_features(self, images: Tensor) -> Any:
        """Images (B, in_chans, H, W) to what the transformer's head reads, laid out as `token_layout` says."""
        raise NotImplementedError

    def forward_head(self, features: Any, pre_logits: bool = False) -> Tensor:
        """Features to logits (B, num_classes), or to the vector before them, by the transformer's own head."""
        return self.vit.forward_head(features, pre_logits=pre_logits)  # type: ignore[operator]

    def feature_points(self) -> list[FeaturePoint]:
        """Where intermediate features are taken: after each stage of the CNN, then after each block and at the readout
        (patch tokens)."""
        stages: list[FeaturePoint] = []
        if not isinstance(self.cnn, OneWayCNN):
            shapes = zip(self.cnn.dims, self.cnn.reductions, strict=True)
            stages = [FeaturePoint(f"cnn.stages.{i}", *shape) for i, shape in enumerate(shapes)]
        walk = self.walk
        read = FeaturePoint("readout_gate", walk.dim, walk.reduction, walk.prefix_tokens, "vit.norm")
        return [*stages, *walk.feature_points("vit", self.vit), read]

    def token_layout(self, img_size: Grid | None = None) -> TokenLayout:
        return tuple(self.vit_layout(img_size or self.img_size))

    def vit_layout(self, size: Grid) -> TokenLayout:
        """What each of the transformer's tokens that fuse is."""
        return self.walk.layout(self.vit, size)

    def attention_layouts(self, img_size: Grid | None = None) -> dict[str, AttentionLayout]:
        size = img_size or self.img_size
        own = self.walk.attention_layouts(self.vit, size)
        return {f"vit.{name}": layout for name, layout in own.items()} | self.fusion_layouts(size)

    def fusion_layouts(self, size: Grid) -> dict[str, AttentionLayout]:
        """What the operators' attention modules see, by name."""
        raise NotImplementedError

    def part_of(self, parameter: str) -> str:
        """Which part a parameter belongs to by its name: "cnn", "vit", "fusion" or "head"."""
        part, _, rest = parameter.partition(".")
        if part == "vit" and rest.startswith("head"):
            return "head"
        return part if part in PARENTS else "fusion"

    def freeze(self, *parents: str) -> Self:
        """Keep "cnn", "vit" or both as they are: no gradient, and BatchNorm's statistics fixed; heads still learn."""
        for parent in parents:
            choose(dict.fromkeys(PARENTS), parent, "parent")
        self.frozen = parents
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.part_of(name) not in parents)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for parent in self.frozen:
            self.get_submodule(parent).eval()
        return self

    @torch.no_grad()
    def set_gates(self, value: float) -> None:
        """Set every gate: 0 leaves either parent as it is alone, but for early joint attention, which is not gated."""
        for name, parameter in self.named_parameters():
            if name.endswith("gate.weight") and self.part_of(name) == "fusion":
                parameter.fill_(value)

    def no_weight_decay(self) -> set[str]:
        fusion = (name for name, _ in self.named_parameters() if self.part_of(name) == "fusion")
        mine = {name for name in fusion if name.endswith(("table", "source", "gate.weight"))}
        theirs: set[str] = getattr(self.vit, "no_weight_decay", set)()
        return mine | {f"vit.{name}" for name in theirs}

    def get_classifier(self) -> nn.Module:
        return self.vit.get_classifier()  # type: ignore[operator]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.vit.reset_classifier(num_classes, global_pool)  # type: ignore[operator]

    def drop_layers_after(self, points: Sequence[FeaturePoint]) -> None:
        """Keep all of them: each side's layers feed the other's, or are told apart by their number."""


class EarlyFusion(TokenFusion):
    """The tokens meet at the entrance, and the transformer carries them on: with joint attention both kinds together,
    with the other operators its own tokens, which have seen the pixels."""

    def __init__(self, cnn: CNN, vit: nn.Module, operator: type[Operator], **config: Any) -> None:
        super().__init__(cnn, vit, operator, **config)
        grid = self.map_grids(self.img_size)[-1]
        self.joint = operator is JointAttention  # which the transformer's own blocks do
        if self.joint:
            self.pixel_source = PixelSource(cnn.dims[-1], self.walk.dim, grid)
        else:
            self.exchange = Exchange(cnn.dims[-1], self.make(one_way=True), self.walk.dim, grid, self.initial_gate)

    def refusal(self, operator: type[Operator]) -> str:
        if operator is ClsAttention:
            return "at the entrance CLS is the same for every image, and so is what it asks"
        if operator is JointAttention and self.walk.rigid:
            return f"no pixel tokens can pass through the transformer's blocks, since {self.walk.rigid}"
        return super().refusal(operator)

    def forward_features(self, images: Tensor) -> Any:
        tokens, others = self.walk.embed(self.vit, images)
        count, feature_map = tokens.shape[1], self.walk_cnn(images)
        if self.joint:
            tokens = torch.cat([tokens, self.pixel_source(feature_map)], dim=1)
        else:
            tokens, _, pixels = self.exchange(tokens, feature_map, self.walk.grid(size_of(images)))
        tokens, others = self.walk_blocks(self.walk.blocks(self.vit), tokens, others)
        if self.joint:
            tokens, pixels = tokens[:, :count], tokens[:, count:]
        return self.read_out(tokens, pixels, others)

    def attention_layouts(self, img_size: Grid | None = None) -> dict[str, AttentionLayout]:
        layouts = super().attention_layouts(img_size)
        if not self.joint:
            return layouts
        size = img_size or self.img_size
        both = AttentionLayout.among((*self.vit_layout(size), TokenGroup("pixel", self.map_grids(size)[-1])))
        return dict.fromkeys(layouts, both)

    def fusion_layouts(self, size: Grid) -> dict[str, AttentionLayout]:
        if self.joint:
            return {}
        grid = coarser(self.map_grids(size)[-1], self.walk.grid(size))
        inside = self.exchange.attention_layouts(self.vit_layout(size), grid)
        return {f"exchange.{name}": layout for name, layout in inside.items()}


class LateFusion(TokenFusion):
    """Each side runs to its end; then `fusion_depth` operators bring their tokens together.

    Args:
        fusion_depth: operators.
    """

    def __init__(
        self, cnn: CNN, vit: nn.Module, operator: type[Operator], *, fusion_depth: int = 2, **config: Any
    ) -> None:
        super().__init__(cnn, vit, operator, **config)
        at_least(1, fusion_depth=fusion_depth)
        self.pixel_source = PixelSource(cnn.dims[-1], self.walk.dim, self.map_grids(self.img_size)[-1])
        # after the last operator no other reads the pixels
        self.operators = nn.ModuleList(self.make(one_way=i == fusion_depth - 1) for i in range(fusion_depth))
        self.gate = Gate((self.walk.dim,), self.initial_gate)

    def refusal(self, operator: type[Operator]) -> str:
        if operator is AlignedAddition and self.walk.reads_cls:
            return "the head reads CLS, and behind the last block CLS never sees what is added to the patches"
        if operator is ClsAttention and not self.walk.reads_cls:
            return "the head reads the patches, and behind the last block they never see what CLS was told"
        return super().refusal(operator)

    def forward_features(self, images: Tensor) -> Any:
        feature_map = self.walk_cnn(images)
        tokens, others = self.walk.embed(self.vit, images)
        tokens, others = self.walk_blocks(self.walk.blocks(self.vit), tokens, others)
        fused, pixels = tokens, self.pixel_source(feature_map)
        grids = Grids(self.walk.grid(size_of(images)), size_of(feature_map))
        for operator in self.operators:
            fused, pixels = self.run(operator, fused, pixels, grids)
        return self.read_out(self.gate(tokens, fused), pixels, others)

    def fusion_layouts(self, size: Grid) -> dict[str, AttentionLayout]:
        tokens, pixels = self.vit_layout(size), (TokenGroup("pixel", self.map_grids(size)[-1]),)
        return {
            f"operators.{i}.{name}": layout
            for i, operator in enumerate(self.operators)
            for name, layout in operator.attention_layouts(tokens, pixels).items()  # type: ignore[operator]
        }


class LayerwiseFusion(TokenFusion):
    """The two exchange tokens after every stage of the CNN; the transformer's blocks are spread over as many groups.

    The transformer's first group follows the first exchange, so that a group and the next stage see each other's last.
    """

    def __init__(self, cnn: CNN, vit: nn.Module, operator: type[Operator], **config: Any) -> None:
        super().__init__(cnn, vit, operator, **config)
        stages, depth = len(cnn.dims), len(self.walk.blocks(vit))
        if depth < stages:
            raise InputError(
                f"{depth} blocks do not spread over {stages} stages of the CNN; take a deeper transformer, "
                f"or a CNN of {depth} stages"
            )
        self.cuts = [depth * i // stages for i in range(stages + 1)]
        two_way, patches = not isinstance(cnn, OneWayCNN), self.walk.grid(self.img_size)
        self.exchanges = nn.ModuleList(
            Exchange(
                channels,
                self.make(one_way=not two_way or i == stages - 1),  # after the last stage nobody reads the map
                self.walk.dim,
                coarser(grid, patches),
                self.initial_gate,
            )
            for i, (channels, grid) in enumerate(zip(cnn.dims, self.map_grids(self.img_size), strict=True))
        )

    def forward_features(self, images: Tensor) -> Any:
        grid, blocks = self.walk.grid(size_of(images)), self.walk.blocks(self.vit)
        tokens, others = self.walk.embed(self.vit, images)
        cnn, feature_map = self.cnn, self.rescale(images)
        maps = cnn.maps(feature_map) if isinstance(cnn, OneWayCNN) else []
        if not isinstance(cnn, OneWayCNN):
            feature_map = cnn.stem(feature_map)
        for i, exchange in enumerate(self.exchanges):
            feature_map = maps[i] if isinstance(cnn, OneWayCNN) else self.run(cnn.stages[i], feature_map)
            tokens, feature_map, pixels = self.run(exchange, tokens, feature_map, grid)
            tokens, others = self.walk_blocks(blocks[self.cuts[i] : self.cuts[i + 1]], tokens, others)
        return self.read_out(tokens, pixels, others)

    def fusion_layouts(self, size: Grid) -> dict[str, AttentionLayout]:
        tokens, patches = self.vit_layout(size), self.walk.grid(size)
        return {
            f"exchanges.{i}.{name}": layout
            for i, (exchange, grid) in enumerate(zip(self.exchanges, self.map_grids(size), strict=True))
            for name, layout in exchange.attention_layouts(tokens, coarser(grid, patches)).items()  # type: ignore[operator]
        }


STRATEGIES: dict[str, type[TokenFusion]] = {"late": LateFusion, "early": EarlyFusion, "layerwise": LayerwiseFusion}
