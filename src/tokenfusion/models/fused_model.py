"""Two parents in one model: what explains it and what trains a part of it: token layouts, feature points, freezing."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from tokenfusion.layers.intermediates import FeaturePoint
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, TokenLayout
from tokenfusion.models.backbones import CNNBackbone, TokenBackbone
from tokenfusion.models.base import PaperModel, choose, image_size, layers_behind
from tokenfusion.models.exchange import draw_branches
from tokenfusion.models.operators import Operator

PARENTS = ("cnn", "vit")


class FusedModel(PaperModel):
    """A CNN and a transformer, whose head is the model's, and how their tokens meet.

    Args:
        cnn, vit: the parents, which the model owns from now on.
        operator: class of the fusion operator.
        img_size: height and width that position tables of pixels are made for; `forward` takes any other that the
            transformer takes.
        in_chans: channels of the images.
        gate: start of the gates.
        mlp_ratio: of the operators' MLPs, where they have one.

    Attributes:
        branch_dropout: share of the images that lose all patches or all pixels while training.
        joint: whether the transformer's own blocks carry pixel tokens too.
        frozen, fixed: parents that are kept as they are; the parameters that learn no more for it, by name.
    """

    branch_dropout: float = 0.0
    joint = False
    frozen: tuple[str, ...] = ()
    fixed: frozenset[str] = frozenset()

    def __init__(
        self,
        cnn: CNNBackbone,
        vit: TokenBackbone,
        operator: type[Operator],
        *,
        img_size: int | tuple[int, int],
        in_chans: int = 3,
        gate: float = 0.0,
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        self.cnn, self.vit = cnn, vit
        self.img_size, self.in_chans = image_size(img_size), in_chans
        self.make_operator = partial(operator, vit.dim, vit.heads, mlp_ratio)
        self.initial_gate = gate

    def branches_kept(self, images: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Which images keep their patches, and which their pixels; all of them, but for branch dropout in training."""
        drops = self.training and self.branch_dropout
        return draw_branches(images, self.branch_dropout) if drops else (None, None)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.vit.num_classes

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return self.vit.num_features

    @property
    def head_hidden_size(self) -> int:  # type: ignore[override]
        return self.vit.head_hidden_size

    @property
    def reads(self) -> str:
        """What the head reads: "cls", "patch" for the mean of the patches, or "votes" of all tokens for each class."""
        return self.vit.reads

    def forward_head(self, features: Any, pre_logits: bool = False) -> Tensor:
        return self.vit.forward_head(features, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module:
        return self.vit.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.vit.reset_classifier(num_classes, global_pool)

    @property
    def global_pool(self) -> str | None:  # type: ignore[override]
        return self.vit.global_pool

    def resize_parts(self, size: Grid) -> None:
        super().resize_parts(size)
        self.vit.resize_parts(size)

    def layers_behind(self, name: str) -> int:
        """Of either parent, its own layers count from the head on; what fuses is as near to it as the head itself."""
        part, _, rest = name.partition(".")
        return layers_behind(self.get_submodule(part).layers(), rest) if part in PARENTS else 0  # type: ignore[operator]

    def map_grids(self, size: Grid) -> list[Grid]:
        """Rows and columns of the CNN's maps for images (H, W)."""
        return self.cnn.grids(size, self.in_chans)

    def operator_grids(self, size: Grid) -> dict[str, Grid]:
        """The grid of the pixel tokens that each operator takes for images (H, W), by the operator's name, in order."""
        raise NotImplementedError

    def feature_points(self) -> list[FeaturePoint]:
        """Where intermediate features are taken: after each stage of the CNN, then after each block (patch tokens)."""
        stages: list[FeaturePoint] = []
        if self.cnn.two_way:
            shapes = zip(self.cnn.dims, self.cnn.reductions, strict=True)
            stages = [FeaturePoint(f"cnn.stages.{i}", *shape) for i, shape in enumerate(shapes)]
        return [*stages, *(point.inside("vit") for point in self.vit.feature_points())]

    def token_layout(self, img_size: Grid | None = None) -> TokenLayout:
        """What each of the transformer's tokens that fuse is."""
        return self.vit.stream_layout(img_size or self.img_size)

    def meeting_layout(self, size: Grid) -> TokenLayout:
        """What each of the transformer's tokens that an operator takes is."""
        return self.token_layout(size)

    def block_layouts(self, size: Grid) -> dict[str, tuple[TokenLayout, ...]]:
        """The transformer's blocks by name, in order, and what each token in their first arguments is."""
        layouts = self.vit.branch_layouts(size)
        if self.joint:
            layouts = ((*self.token_layout(size), TokenGroup("pixel", self.map_grids(size)[-1])),)
        names = {module: name for name, module in self.named_modules()}
        return {names[block]: layouts for block in self.vit.blocks}

    def meetings(self, size: Grid) -> dict[str, tuple[TokenLayout, ...]]:
        """Where both kinds of tokens can be met: modules by name, in order, and what their first arguments hold."""
        patches = self.meeting_layout(size)
        return {name: (patches, (TokenGroup("pixel", grid),)) for name, grid in self.operator_grids(size).items()}

    def entrance(self, size: Grid) -> tuple[str, tuple[TokenLayout, ...]]:
        """The last module that is given the patches while no other token carries anything of them, and what its first
        arguments hold: where a change of the patches changes all that is made of them."""
        return next(iter(self.block_layouts(size).items()))

    def gates(self) -> dict[str, str]:
        """The gates of what the transformer's tokens are told, by name, each with the module that is given the tokens
        as they are before."""
        return {}

    def attention_layouts(self, img_size: Grid | None = None) -> dict[str, AttentionLayout]:
        size = img_size or self.img_size
        layouts = {f"vit.{name}": layout for name, layout in self.vit.attention_layouts(size).items()}
        if self.joint:
            (both,) = next(iter(self.block_layouts(size).values()))
            layouts = dict.fromkeys(layouts, AttentionLayout.among(both))
        for name, grid in self.operator_grids(size).items():
            operator, pixels = self.get_submodule(name), (TokenGroup("pixel", grid),)
            assert isinstance(operator, Operator)
            inside = operator.attention_layouts(self.meeting_layout(size), pixels)
            layouts |= {f"{name}.{part}": layout for part, layout in inside.items()}
        return layouts

    def part_of(self, parameter: str) -> str:
        """Which part a parameter belongs to by its name: "cnn", "vit", "fusion" or "head"."""
        part, _, rest = parameter.partition(".")
        if part == "vit" and rest.startswith(self.vit.head_name):
            return "head"
        return part if part in PARENTS else "fusion"

    def freeze(self, *parents: str) -> Self:
        """Keep "cnn", "vit" or both as they are, but for the head: no gradient, and evaluation while the rest trains:
        BatchNorm's statistics are fixed, and there is no dropout or stochastic depth.

        A call takes the place of the one before: what that froze and this does not name learns again, and with no name
        everything does. What was without a gradient before the first stays so.
        """
        for parent in parents:
            choose(dict.fromkeys(PARENTS), parent, "parent")
        parameters = dict(self.named_parameters())
        for name in self.fixed:
            parameters[name].requires_grad_(True)
        learning = {name for name, parameter in parameters.items() if parameter.requires_grad}
        self.frozen, self.fixed = parents, frozenset(name for name in learning if self.part_of(name) in parents)
        for name in self.fixed:
            parameters[name].requires_grad_(False)
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
        return mine | {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def drop_layers_after(self, points: Sequence[FeaturePoint]) -> None:
        """Keep all of them: each side's layers feed the other's, or are told apart by their number."""
