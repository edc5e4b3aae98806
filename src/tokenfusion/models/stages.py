"""How CNNs of timm and of this package are walked, stage by stage.

Letters: B batch, C channels, h w grid.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from timm.models._features import FeatureListNet
from torch import Tensor, nn
from torch.func import functional_call

from tokenfusion.errors import InputError
from tokenfusion.layers.conv import ConvTrunk
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import grid_of, size_of
from tokenfusion.models.walks import walk_transformer

MAX_STAGES = 4
"""Stages that exchange tokens at most: a CNN's last ones, whose maps are coarse enough to be tokens."""


class StagedCNN(nn.Module):
    """A CNN as a stem and stages, each a module from map to map.

    Args:
        stem: from images to the first stage's input.
        stages: the rest.
        dims: channels of the map after each stage.
        reductions: pixels of the image per place of that map, along one side.
    """

    def __init__(self, stem: nn.Module, stages: Iterable[nn.Module], dims: Sequence[int], reductions: Sequence[int]):
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.dims, self.reductions = tuple(dims), tuple(reductions)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last stage's map (B, dims[-1], h, w)."""
        feature_map = self.stem(images)
        for stage in self.stages:
            feature_map = stage(feature_map)
        return feature_map


class OneWayCNN(nn.Module):
    """A CNN that gives its maps all at once, so that nothing can be added to them on the way.

    Args:
        model: has timm's `forward_intermediates`.
        dims, reductions: of its last maps, as in `StagedCNN`.
        indices: which of the model's intermediate features those are.
    """

    def __init__(self, model: nn.Module, dims: Sequence[int], reductions: Sequence[int], indices: Sequence[int]):
        super().__init__()
        self.model = model
        self.dims, self.reductions, self.indices = tuple(dims), tuple(reductions), list(indices)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) to the maps, each (B, dims[i], h, w)."""
        return self.model.forward_intermediates(images, indices=self.indices, intermediates_only=True)  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last map (B, dims[-1], h, w)."""
        return self.maps(images)[-1]


CNN = ConvTrunk | StagedCNN | OneWayCNN


def walk_cnn(model: nn.Module, img_size: Grid, in_chans: int, stages: int = MAX_STAGES) -> CNN:
    """A CNN whose stages can be walked one at a time or, failing that, one that gives its maps; its head is dropped.

    Args:
        model: of timm or of this package; it gives its modules to the result.
        img_size: height and width in pixels that it must be able to take.
        in_chans: channels of the images.
        stages: how many to walk at most.

    Raises:
        InputError: the model gives no feature maps, or its maps vanish at this size.
    """
    name, training = type(model).__name__, model.training
    trunk = getattr(model, "cnn", None)
    if trunk is not None and hasattr(model, "vit"):
        raise InputError(f"a {name} is fused already; give one of its parents, such as cnn(tokenfusion_late_micro)")
    if isinstance(trunk, ConvTrunk):  # this package's ResNet
        return trunk
    if is_transformer(model):
        raise InputError(f"a {name} is a transformer, given in the CNN's place; give a CNN such as resnet18 there")
    info = list(getattr(model, "feature_info", None) or [])
    if not info:
        raise InputError(f"a {name} has no stages: it names no feature maps; take a CNN such as resnet18")
    staged = split_stages(model, stages)
    if staged is not None and not isinstance(map_shapes(staged, img_size, in_chans), str):
        return staged.train(training)
    if not hasattr(model, "forward_intermediates"):
        raise InputError(f"a {name} has no stages to walk and no forward_intermediates; take a CNN such as resnet18")
    indices = list(range(len(info)))[-stages:]
    model.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)  # type: ignore[operator]
    one_way = OneWayCNN(model, [info[i]["num_chs"] for i in indices], [info[i]["reduction"] for i in indices], indices)
    if isinstance(reason := map_shapes(one_way, img_size, in_chans), str):
        raise InputError(
            f"a {name} gives no maps (B, C, h, w) for {in_chans}-channel images of {img_size[0]}×{img_size[1]} pixels: "
            f"{reason}; give a larger img_size or the in_chans that it was built for, or take another CNN"
        )
    return one_way.train(training)


def is_transformer(model: nn.Module) -> bool:
    """Whether a model could be the other half of the pair."""
    try:
        walk_transformer(model)
    except InputError:
        return False
    return True


def split_stages(model: nn.Module, stages: int) -> StagedCNN | None:
    """A model of timm cut behind its last features; None where its modules do not follow each other in a row, or where
    it has parameters of its own, which it adds between them."""
    if next(model.parameters(recurse=False), None) is not None:
        return None
    info: Any = model.feature_info
    count = len(info)
    names = [entry["module"] for entry in info]
    if (
        hasattr(model, "blocks")
        and hasattr(model, "conv_stem")
        and all("blocks" in name or not name for name in names[1:])
    ):
        rows = [module for key, module in model.named_children() if key in ("conv_stem", "bn1", "act1")]
        ends = [int(name.split(".")[1]) + 1 for name in names if name.startswith("blocks.")]
        layers, offset = [*rows, *model.blocks], len(rows)  # type: ignore[misc]
        cuts = [offset + end for end in ends]
    else:
        try:
            net = FeatureListNet(model, tuple(range(count)), flatten_sequential=any("." in name for name in names))
        except (AssertionError, AttributeError, KeyError):
            return None
        layers = list(net.values())
        cuts = [i + 1 for i, key in enumerate(net) if key in net.return_layers]
    chosen = cuts[-stages:]
    features = list(info)[-len(chosen) :]
    # with no feature before the first stage, the stem is all but that stage's last module
    before = cuts[-len(chosen) - 1] if len(cuts) > len(chosen) else chosen[0] - 1
    bounds = [before, *chosen]
    return StagedCNN(
        nn.Sequential(*layers[:before]),
        [nn.Sequential(*layers[start:end]) for start, end in pairwise(bounds)],
        [entry["num_chs"] for entry in features],
        [entry["reduction"] for entry in features],
    )


def meta_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers on the meta device, for `functional_call`: it then computes shapes alone."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in named}


def map_shapes(cnn: CNN, img_size: Grid, in_chans: int) -> list[Grid] | str:
    """Grids of the CNN's maps for images of a size, or why walking it does not give the maps that it names."""
    if isinstance(cnn, ConvTrunk):
        return [grid_of(img_size, reduction) for reduction in cnn.reductions]
    known = FOUND.setdefault(cnn, {})
    key = (*img_size, in_chans)
    if key not in known:
        known[key] = find_shapes(cnn, img_size, in_chans)
    return known[key]


FOUND: WeakKeyDictionary[nn.Module, dict[tuple[int, int, int], list[Grid] | str]] = WeakKeyDictionary()
"""What `find_shapes` gave, which takes as long as a pass of a few images; layouts are asked for at every pass."""


def find_shapes(cnn: StagedCNN | OneWayCNN, img_size: Grid, in_chans: int) -> list[Grid] | str:
    """As `map_shapes`. Nothing is computed: the CNN runs with weights on the meta device."""
    images = torch.empty(2, in_chans, *img_size, device="meta")
    training = cnn.training
    cnn.eval()
    try:
        maps = functional_call(
            WithMaps(cnn), {f"cnn.{name}": tensor for name, tensor in meta_tensors(cnn).items()}, images
        )
    except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError, LookupError) as error:
        return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    finally:
        cnn.train(training)
    good = all(
        isinstance(m, Tensor) and m.ndim == 4 and m.shape[1] == dim and min(m.shape[2:]) > 0
        for m, dim in zip(maps, cnn.dims, strict=True)
    )
    return [size_of(m) for m in maps] if good else "they are not of the channels that it names, or vanish"


class WithMaps(nn.Module):
    """Every stage's map of a CNN."""

    def __init__(self, cnn: CNN) -> None:
        super().__init__()
        self.cnn = cnn

    def forward(self, images: Tensor) -> list[Tensor]:
        if isinstance(self.cnn, OneWayCNN):
            return self.cnn.maps(images)
        maps = [self.cnn.stem(images)]
        for stage in self.cnn.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]
