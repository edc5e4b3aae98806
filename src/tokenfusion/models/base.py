"""What every paper's model answers, in timm's words."""

import copy
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tokenfusion.errors import InputError, first_line
from tokenfusion.layers.checkpointing import Checkpointed
from tokenfusion.layers.intermediates import FeaturePoint, gather_outputs
from tokenfusion.layers.positions import Grid, PositionTable, RelativePositionTable
from tokenfusion.layers.tokens import AttentionLayout, TokenLayout, map_to_tokens, size_of
from tokenfusion.models.official import OfficialNames

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
DECAY_LAYERS = 12
OUTPUT_FORMATS = {"NCHW": lambda feature_map: feature_map, "NLC": map_to_tokens}


class PaperModel(Checkpointed):
    """An image classifier with timm's interface.

    A paper's model sets the attributes below and writes `forward_features`, `forward_head`, `feature_points`,
    `token_layout`, `attention_layouts`, `layers`, `no_weight_decay` and `build_head`.

    Attributes:
        global_pool: "" where `forward` gives what `forward_features` does; else the paper's pooling takes place.
    """

    global_pool: str | None = None

    official_names: ClassVar[OfficialNames]
    in_chans: int
    num_classes: int
    num_features: int
    head_hidden_size: int
    img_size: Grid
    head: nn.Module

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        features = self.forward_features(images)
        return features if self.global_pool == "" else self.forward_head(features)

    def forward_features(self, images: Tensor) -> Any:
        """Images to what the head reads."""
        raise NotImplementedError

    def forward_head(self, features: Any, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gave, to logits, or to the vector before them."""
        raise NotImplementedError

    def build_head(self, num_classes: int) -> nn.Module:
        """A new classifier."""
        raise NotImplementedError

    def feature_points(self) -> list[FeaturePoint]:
        """Where intermediate features can be had."""
        raise NotImplementedError

    def token_layout(self, img_size: Grid | None = None) -> TokenLayout:
        """What each token of `forward_features` is, for images of `img_size` (H, W) or the model's own size."""
        raise NotImplementedError

    def attention_layouts(self, img_size: Grid | None = None) -> dict[str, AttentionLayout]:
        """What each attention module's queries and keys are, by the module's dotted name, in order."""
        raise NotImplementedError

    def layers(self) -> list[str]:
        """Patterns that parameters' names begin with, layer by layer from the images on; the head's match none."""
        raise NotImplementedError

    def layers_behind(self, name: str) -> int:
        """How many layers a parameter, by its name, has between it and the head, whose own have 0."""
        return layers_behind(self.layers(), name)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:  # noqa: ARG002 - timm's signature
        """From a parameter's name to its layer, in order, the head's the last: for timm's layer-wise learning rates."""
        return lambda name: -self.layers_behind(name)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone."""
        return set()

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The intermediate features that can be had, in timm's form."""
        return [point.as_feature_info() for point in self.feature_points()]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Intermediate features, with timm's signature.

        Args:
            x: images (B, in_chans, H, W).
            indices: which of `feature_info`: a list, the last n, or all.
            return_prefix_tokens: give pairs of a feature and the tokens (B, K, C) before it; a map has none, K = 0.
            norm: apply the model's final norm to features that are tokens.
            stop_early: leave out the layers after the last chosen feature. Without `intermediates_only` they run all
                the same, for what `forward_features` gives.
            output_fmt: "NCHW" for maps (B, C, h, w), "NLC" for tokens (B, h·w, C).
            intermediates_only: give the features alone.

        Returns:
            What `forward_features` gives, and the chosen features in the order of `feature_info`; or those alone.

        Raises:
            InputError: an unknown `output_fmt`.
        """
        formatted = choose(OUTPUT_FORMATS, output_fmt, "output_fmt")
        points = self.feature_points()
        chosen = [points[i] for i in sorted(feature_take_indices(len(points), indices, as_set=True)[0])]
        final, outputs = gather_outputs(self, chosen, x, stop_early=stop_early and intermediates_only)
        features: list[Any] = []
        for point, output in zip(chosen, outputs, strict=True):
            tokens = self.get_submodule(point.norm)(output) if norm and point.norm else output
            feature_map, prefix = point.split(tokens, size_of(x))
            feature = formatted(feature_map)
            features.append((feature, prefix) if return_prefix_tokens else feature)
        return features if intermediates_only else (final, features)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen features do not need: later layers, the final norms, the head.

        Returns:
            The chosen features' indices, none negative.
        """
        points = self.feature_points()
        take, _ = feature_take_indices(len(points), indices)
        self.drop_layers_after([points[i] for i in take])
        if prune_norm:
            for name in {point.norm for point in points if point.norm}:
                self.set_submodule(name, nn.Identity())
        if prune_head:
            self.reset_classifier(0)
        return take

    def drop_layers_after(self, points: Sequence[FeaturePoint]) -> None:
        """Shorten each row of layers that has some of these points after the last of them."""
        last: dict[str, int] = {}
        for point in points:
            row, _, place = point.module.rpartition(".")
            last[row] = max(last.get(row, 0), int(place))
        for row, end in last.items():
            layers = self.get_submodule(row)
            assert isinstance(layers, nn.ModuleList | nn.Sequential)
            del layers[end + 1 :]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the model one for images of another size: position tables are resized to it.

        Logits of such images stay as they were; training then learns positions on their own grid.

        Args:
            img_size: height and width in pixels.

        Raises:
            InputError: no size, or one that the model cannot take; it is then as it was.
        """
        size = image_size(img_size)
        grids = self.table_grids(size)
        self.resize_parts(size)
        for name, asked in grids.items():
            self.get_submodule(name).move_to(*asked)  # type: ignore[operator]
        described: Any = self
        described._traits = getattr(self, "_traits", {}) | {"img_size": size}  # where timm looks when it saves a model
        if config := getattr(self, "pretrained_cfg", None):
            pool_size = self.token_layout()[-1].grid if config.get("pool_size") else None
            config = config | {"input_size": (self.in_chans, *size), "pool_size": pool_size}
            described.pretrained_cfg = described.default_cfg = config

    def resize_parts(self, size: Grid) -> None:
        """Make what has a size of its own, but for position tables, one for images (H, W)."""
        self.img_size = size

    def table_grids(self, size: Grid) -> dict[str, tuple[Grid, ...]]:
        """The grids that each position table, by its name, is asked for by images of a size.

        Raises:
            InputError: the model cannot take such images.
        """
        grids: dict[str, tuple[Grid, ...]] = {}
        twin = on_meta(self).eval()
        twin.resize_parts(size)
        for name, module in twin.named_modules():
            if isinstance(module, PositionTable | RelativePositionTable):
                module.register_forward_pre_hook(lambda _, asked, name=name: grids.update({name: asked}))
        try:
            twin(torch.empty(2, self.in_chans, *size, device="meta"))
        except (AssertionError, RuntimeError) as error:
            reason = first_line(error)
            raise InputError(f"the model cannot take images of {size[0]}×{size[1]} pixels: {reason}") from error
        return grids

    def get_classifier(self) -> nn.Module:
        """The module that makes logits."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes` classes; 0 leaves features.

        Args:
            num_classes: outputs.
            global_pool: "" to leave out the pooling too, with 0 classes; from then on `forward` gives what
                `forward_features` does. None for the paper's own.

        Raises:
            InputError: another pooling, since each paper here has its own; no number of classes.
        """
        require_own_pooling(global_pool, num_classes)
        self.global_pool = global_pool
        anchor = next(self.parameters())
        self.head = self.build_head(num_classes).to(anchor.device, anchor.dtype).train(self.training)
        self.num_classes = num_classes


def require_own_pooling(global_pool: str | None, num_classes: int) -> None:
    """Refuse another pooling than a paper's own; "" leaves it out, with 0 classes."""
    if global_pool or (global_pool == "" and num_classes):
        why = "the paper fixes it" if global_pool else "the head reads what is pooled; give num_classes=0"
        raise InputError(f"global_pool={global_pool!r} cannot be chosen: {why}, or leave it out")


def layers_behind(layers: Sequence[str], name: str) -> int:
    """How many layers a parameter has behind it, by the patterns of all; 0 where none is its own.

    Of deeper models neighbours count as one, so that no more than 12 do: rates that decay from layer to layer are told
    for so many (ConvNeXt, arXiv 2201.03545, appendix A).
    """
    place = next((i for i, pattern in enumerate(layers) if re.match(pattern, name)), None)
    groups = min(len(layers), DECAY_LAYERS)
    return 0 if place is None else groups - place * groups // len(layers)


def on_meta(module: M) -> M:
    """A copy without weights: on the meta device nothing is computed, and nothing kept."""
    own: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        own[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, own)


def linear_head(dim: int, num_classes: int) -> nn.Module:
    """A linear classifier, or nothing for 0 classes; InputError where that is no number of classes."""
    at_least(0, num_classes=num_classes)
    if not num_classes:
        return nn.Identity()
    head = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def at_least(least: int, **arguments: int | Sequence[int]) -> None:
    """Raise InputError unless each argument is a whole number, or several, none below `least`."""
    for name, value in arguments.items():
        numbers = value if isinstance(value, tuple | list) else (value,)
        if not all(isinstance(number, int) and number >= least for number in numbers):
            raise InputError(f"{name}={value!r} cannot be built; give whole numbers, {least} or more")


def image_size(img_size: int | tuple[int, int]) -> Grid:
    """`img_size` as (height, width).

    Raises:
        InputError: not one or two whole numbers, or a side is smaller than one pixel.
    """
    sides = tuple(img_size) if isinstance(img_size, tuple | list) else (img_size, img_size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise InputError(f"img_size={img_size!r} is not a size; give a height and a width, or one number for both")
    height, width = sides
    if height < 1 or width < 1:
        nearest = max(height, 1), max(width, 1)
        raise InputError(f"img_size={img_size} has no pixels; the nearest that works is {nearest}")
    return height, width


def choose(choices: Mapping[str, T], name: str, what: str) -> T:
    """One of several named choices.

    Raises:
        InputError: there is none of that name; the nearest is offered.
    """
    if name in choices:
        return choices[name]
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"{what}={name!r} is not known; {hint}there are: {', '.join(choices)}")
