"""How CNNs and transformers of timm and of this package are walked: a CNN stage by stage, a transformer block by block.

Letters: B batch, T tokens of a transformer (its prefix, CLS first, then patches row by row), C channels, h w grid.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from timm.layers import PatchDropout
from timm.models._features import FeatureListNet
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from tokenfusion.errors import InputError
from tokenfusion.layers.conv import ConvTrunk
from tokenfusion.layers.intermediates import FeaturePoint
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, TokenLayout, grid_of, size_of
from tokenfusion.models.base import PaperModel
from tokenfusion.models.transformer import PlainTransformer

MAX_STAGES = 4
"""Stages that exchange tokens at most: a CNN's last ones, whose maps are coarse enough to be tokens."""
Run = Callable[..., Any]


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


class Walk:
    """How a kind of transformer is walked; it holds no module, so that a copied model walks its own.

    Attributes:
        reduction: side of a patch in pixels.
        rigid: why no further tokens can pass through the blocks; "" where they can.
        prefix: what the tokens before the patches are.
        reads_cls: whether the head reads CLS, rather than the mean of the patches.
    """

    reduction: int
    rigid: str = ""
    reads_cls: bool = True

    def __init__(self, vit: Any) -> None:
        self.dim: int = vit.embed_dim
        self.heads: int = vit.blocks[0].attn.heads
        self.prefix_tokens, self.prefix = 1, ["cls"]
        self.reduction = vit.patch_size

    def blocks(self, vit: Any) -> Sequence[nn.Module]:
        """What is walked."""
        return vit.blocks

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Any]:
        """Images (B, in_chans, H, W) to the tokens that fuse (B, T, C), and what else the blocks take."""
        return vit.embed(images)[0], ()

    def step(self, run: Run, block: nn.Module, tokens: Tensor, others: Any) -> tuple[Tensor, Any]:
        """A block, called through `run`."""
        return run(block, tokens, *others), others

    def finish(self, vit: Any, tokens: Tensor, others: Any) -> Any:  # noqa: ARG002
        """What `vit.forward_head` reads."""
        return vit.norm(tokens)

    def grid(self, size: Grid) -> Grid:
        """Rows and columns of the patches of images (H, W)."""
        return grid_of(size, self.reduction)

    def feature_points(self, name: str, vit: Any) -> list[FeaturePoint]:
        """Where the intermediate features of a transformer called `name` are taken: after each block."""
        return [
            FeaturePoint(f"{name}.blocks.{i}", self.dim, self.reduction, self.prefix_tokens, f"{name}.norm")
            for i in range(len(vit.blocks))
        ]

    def layout(self, vit: Any, size: Grid) -> TokenLayout:
        """What each of the tokens that fuse is."""
        return vit.token_layout(size)

    def attention_layouts(self, vit: Any, size: Grid) -> dict[str, AttentionLayout]:
        """What the transformer's own attention modules see when it is alone, by name."""
        return vit.attention_layouts(size)


class TimmWalk(Walk):
    """timm's VisionTransformer, and so ViT, DeiT, DINOv2, CLIP's and SigLIP's."""

    def __init__(self, vit: Any) -> None:
        self.dim, self.prefix_tokens = vit.embed_dim, vit.num_prefix_tokens
        self.heads = vit.blocks[0].attn.num_heads
        self.reduction = vit.patch_embed.feat_ratio(as_scalar=True)
        self.pads = getattr(vit.patch_embed, "dynamic_img_pad", False)
        self.reads_cls = vit.global_pool == "token"
        known = ["cls"] * (vit.cls_token is not None) + ["dist"] * hasattr(vit, "dist_token")
        self.prefix = [*known, *["register"] * (self.prefix_tokens - len(known))]

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Any]:
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))), ()

    def grid(self, size: Grid) -> Grid:
        return super().grid(size) if self.pads else (size[0] // self.reduction, size[1] // self.reduction)

    def layout(self, vit: Any, size: Grid) -> TokenLayout:  # noqa: ARG002
        return *map(TokenGroup, self.prefix), TokenGroup("patch", self.grid(size))

    def attention_layouts(self, vit: Any, size: Grid) -> dict[str, AttentionLayout]:
        layout = AttentionLayout.among(self.layout(vit, size))
        return {f"blocks.{i}.attn": layout for i in range(len(vit.blocks))}


class BeitWalk(TimmWalk):
    """timm's BEiT: its attention adds a bias for each pair of places."""

    rigid = "its attention has a bias for each pair of its own tokens"

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Any]:
        patches = vit.patch_embed(images)
        tokens = torch.cat([vit.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = vit.pos_drop(tokens if vit.pos_embed is None else tokens + vit.pos_embed)
        return tokens, () if vit.rel_pos_bias is None else (vit.rel_pos_bias(),)


class EvaWalk(TimmWalk):
    """timm's EVA: its attention turns queries and keys by their places."""

    rigid = "its attention turns each of its own tokens by its place"

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Any]:
        tokens, rope = vit._pos_embed(vit.patch_embed(images))
        return vit.norm_pre(tokens), () if rope is None else (rope,)


class CrossViTWalk(Walk):
    """This package's CrossViT: the large branch's tokens fuse, and its stages take both branches on."""

    rigid = "its stages bring two branches together, each of its own tokens"

    def __init__(self, vit: Any) -> None:
        self.dim, self.prefix_tokens, self.prefix = vit.embed_dim[1], 1, ["cls"]
        self.heads = vit.stages[0].large[0].attn.heads
        self.reduction = vit.scale_large.reduction
        self.scale = vit.scale_large

    def blocks(self, vit: Any) -> Sequence[nn.Module]:
        return vit.stages

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Any]:
        small, large, grids = vit.embed(images)
        return large, (small, grids)

    def step(self, run: Run, block: nn.Module, tokens: Tensor, others: Any) -> tuple[Tensor, Any]:
        small, grids = others
        small, large = run(block, small, tokens, grids)
        return large, (small, grids)

    def finish(self, vit: Any, tokens: Tensor, others: Any) -> Any:
        return vit.norm_small(others[0]), vit.norm_large(tokens)

    def grid(self, size: Grid) -> Grid:
        return self.scale.grid(*size)

    def feature_points(self, name: str, vit: Any) -> list[FeaturePoint]:
        return [replace(p, module=f"{name}.{p.module}", norm=f"{name}.{p.norm}") for p in vit.feature_points()]

    def layout(self, vit: Any, size: Grid) -> TokenLayout:
        return vit.branch_layouts(size)[1]


def walk_transformer(vit: nn.Module) -> Walk:
    """How to walk a transformer.

    Raises:
        InputError: it has no row of blocks over [CLS; patches] that this package knows how to walk.
    """
    if isinstance(vit, PlainTransformer):
        return Walk(vit)
    if isinstance(vit, VisionTransformer | Beit | Eva):
        return walk_timm(vit)
    if isinstance(vit, PaperModel) and hasattr(vit, "branch_layouts"):
        return CrossViTWalk(vit)
    raise InputError(
        f"a {type(vit).__name__} is none of the transformers whose blocks are walked; "
        "take a ViT, DeiT, BEiT or EVA of timm's, or deepvit_*, crossvit_* or vit_micro"
    )


def walk_timm(vit: Any) -> Walk:
    """How to walk one of timm's transformers."""
    reasons = {
        "its blocks hold several attentions side by side": not hasattr(vit.blocks[0], "attn"),
        "its head asks the tokens by an attention of its own": isinstance(getattr(vit, "attn_pool", None), nn.Module),
        "it drops patches while it trains, so that none has a place": isinstance(
            getattr(vit, "patch_drop", None), PatchDropout
        ),
        "its rotary positions differ from block to block": getattr(vit, "rope_mixed", False),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"this {type(vit).__name__} cannot be walked: {reason}; take a plain ViT, DeiT, BEiT or EVA"
            )
    walks: dict[type, type[Walk]] = {Beit: BeitWalk, Eva: EvaWalk}
    walk = next((walk for kind, walk in walks.items() if isinstance(vit, kind)), TimmWalk)
    return walk(vit)
