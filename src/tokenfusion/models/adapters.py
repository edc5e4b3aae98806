"""timm's networks as backbones: CNNs cut into stages; vision transformers with what blocks need besides tokens."""

import re
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from timm.layers import PatchDropout
from timm.models._features import FeatureListNet
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenfusion.errors import InputError
from tokenfusion.layers.intermediates import FeaturePoint
from tokenfusion.layers.positions import Grid
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup, TokenLayout
from tokenfusion.models.backbones import CNNBackbone, TokenBackbone

MAX_STAGES = 4
"""Stages that exchange tokens at most: a CNN's last ones, whose maps are coarse enough to be tokens."""


class OneWayCNN(CNNBackbone):
    """A CNN that gives its maps all at once, each of which passes a stage that leaves it as it is.

    Args:
        model: has timm's `forward_intermediates`; pruned to what the maps need.
        stages: how many maps to give at most: the last ones.
    """

    two_way = False

    def __init__(self, model: nn.Module, stages: int) -> None:
        info: Any = model.feature_info
        self.indices = list(range(len(info)))[-stages:]
        last = [info[i] for i in self.indices]
        stages_seen = [nn.Identity() for _ in last]
        super().__init__(nn.Identity(), stages_seen, [i["num_chs"] for i in last], [i["reduction"] for i in last])
        model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)  # type: ignore[operator]
        self.model = model

    def maps(self, images: Tensor) -> list[Tensor]:
        maps = self.take(images, self.indices)
        return [stage(feature_map) for stage, feature_map in zip(self.stages, maps, strict=True)]

    def forward(self, images: Tensor) -> Tensor:
        return self.stages[-1](self.take(images, self.indices[-1:])[0])

    def take(self, images: Tensor, indices: list[int]) -> list[Tensor]:
        """The maps of some entries of the model's `feature_info`."""
        return self.model.forward_intermediates(  # type: ignore[operator]
            self.rescale(images), indices=indices, intermediates_only=True
        )

    def layers(self) -> list[str]:
        info: Any = self.model.feature_info
        names = [re.escape(name) for entry in info if (name := entry["module"])]
        return [rf"model\.(?!({'|'.join(names)})\.)", *(rf"model\.{name}\." for name in names)]

    def start(self, images: Tensor) -> tuple[Tensor, Any]:
        return images, self.maps(images)

    def stage(self, index: int, feature_map: Tensor, context: Any) -> Tensor:  # noqa: ARG002
        return context[index]


def as_cnn(
    model: nn.Module, img_size: Grid, in_chans: int, stages: int, tried: CNNBackbone | None = None
) -> CNNBackbone:
    """A CNN whose stages can be called one at a time or, failing that, one that gives its maps; its head is dropped.

    Args:
        model: of timm or of this package; it gives its modules to the result.
        img_size: height and width in pixels that it must be able to take.
        in_chans: channels of the images.
        stages: how many to call at most.
        tried: what became of a copy of the model, where there is one: its maps are not looked for again.

    Raises:
        InputError: the model gives no feature maps, or its maps vanish at this size.
    """
    name, training = type(model).__name__, model.training
    if isinstance(own := getattr(model, "cnn", model), CNNBackbone):
        if hasattr(model, "vit"):
            raise InputError(f"a {name} is fused already; give one of its parents, such as cnn(tokenfusion_late_micro)")
        return own
    if isinstance(model, TokenBackbone | VisionTransformer | Beit | Eva):
        raise InputError(f"a {name} is a transformer, given in the CNN's place; give a CNN such as resnet18 there")
    if not getattr(model, "feature_info", None):
        raise InputError(f"a {name} has no stages: it names no feature maps; take a CNN such as resnet18")
    found = {} if tried is None else tried.found
    staged = None if isinstance(tried, OneWayCNN) else split_stages(model, stages)
    if staged is not None:
        staged.found |= found
        # modules that do not follow each other fail in whatever way theirs is; such a CNN goes one way
        with suppress(InputError, TypeError, AttributeError, LookupError):
            staged.grids(img_size, in_chans)
            return staged.train(training)
    if not hasattr(model, "forward_intermediates"):
        raise InputError(f"a {name} has no stages of its own and no forward_intermediates; take a CNN such as resnet18")
    one_way = OneWayCNN(model, stages).train(training)
    one_way.found |= found
    try:
        one_way.grids(img_size, in_chans)
    except InputError as error:
        raise InputError(str(error).replace("the CNN", f"a {name}", 1)) from error
    return one_way


def split_stages(model: Any, stages: int) -> CNNBackbone | None:
    """A model of timm cut behind its last features; None where its modules do not follow each other in a row, or where
    it has parameters of its own, which it adds between them."""
    if next(model.parameters(recurse=False), None) is not None:
        return None
    info = model.feature_info
    names = [entry["module"] for entry in info]
    in_blocks = all("blocks" in name or not name for name in names[1:])
    if hasattr(model, "blocks") and hasattr(model, "conv_stem") and in_blocks:
        rows = [module for key, module in model.named_children() if key in ("conv_stem", "bn1", "act1")]
        layers = [*rows, *model.blocks]
        cuts = [len(rows) + int(name.split(".")[1]) + 1 for name in names if name.startswith("blocks.")]
    else:
        try:
            net = FeatureListNet(model, tuple(range(len(info))), flatten_sequential=any("." in name for name in names))
        except (AssertionError, AttributeError, KeyError):
            return None
        layers = list(net.values())
        cuts = [i + 1 for i, key in enumerate(net) if key in net.return_layers]
    if not cuts:
        return None
    chosen = cuts[-stages:]
    features = list(info)[-len(chosen) :]
    # with no feature before the first stage, the stem is all but that stage's last module
    before = cuts[-len(chosen) - 1] if len(cuts) > len(chosen) else chosen[0] - 1
    return CNNBackbone(
        nn.Sequential(*layers[:before]),
        [nn.Sequential(*layers[start:end]) for start, end in pairwise([before, *chosen])],
        [entry["num_chs"] for entry in features],
        [entry["reduction"] for entry in features],
    )


class ViTBackbone(TokenBackbone):
    """timm's VisionTransformer, and so ViT, DeiT, DINOv2, CLIP's and SigLIP's.

    Args:
        model: with its head, which becomes the backbone's.
    """

    head_name = "model.head"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.img_size = model.patch_embed.img_size
        self.dim, self.heads = model.embed_dim, model.blocks[0].attn.num_heads
        self.reduction = model.patch_embed.feat_ratio(as_scalar=True)
        self.reads = "cls" if model.global_pool == "token" else "patch"
        known = ["cls"] * (model.cls_token is not None) + ["dist"] * hasattr(model, "dist_token")
        self.prefix = (*known, *["register"] * (model.num_prefix_tokens - len(known)))
        self.default_cfg = getattr(model, "default_cfg", None)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        return tuple(self.model.blocks)

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        vit = self.model
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))), ()

    def step(self, block: nn.Module, tokens: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        return self.run(block, tokens, *context)

    def finish(self, tokens: Tensor, context: Any) -> Tensor:  # noqa: ARG002
        return self.model.norm(tokens)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(features, pre_logits=pre_logits)

    def grid(self, size: Grid) -> Grid:
        pads = getattr(self.model.patch_embed, "dynamic_img_pad", False)
        return super().grid(size) if pads else (size[0] // self.reduction, size[1] // self.reduction)

    def token_layout(self, img_size: Grid | None = None) -> TokenLayout:
        return *map(TokenGroup, self.prefix), TokenGroup("patch", self.grid(img_size or self.img_size))

    def attention_layouts(self, img_size: Grid | None = None) -> dict[str, AttentionLayout]:
        layout = AttentionLayout.among(self.token_layout(img_size))
        return {f"model.blocks.{i}.attn": layout for i in range(len(self.blocks))}

    def feature_points(self) -> list[FeaturePoint]:
        return [
            FeaturePoint(f"model.blocks.{i}", self.dim, self.reduction, len(self.prefix), "model.norm")
            for i in range(len(self.blocks))
        ]

    def layers(self) -> list[str]:
        entrance = r"model\.(?!blocks\.|norm\.|fc_norm\.|head)"
        return [entrance, *(rf"model\.blocks\.{i}\." for i in range(len(self.blocks)))]

    def resize_parts(self, size: Grid) -> None:
        self.model.set_input_size(img_size=size)
        super().resize_parts(size)

    def no_weight_decay(self) -> set[str]:
        return {f"model.{name}" for name in getattr(self.model, "no_weight_decay", set)()}

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.model.num_classes

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return self.model.num_features

    @property
    def head_hidden_size(self) -> int:  # type: ignore[override]
        return self.model.head_hidden_size

    def get_classifier(self) -> nn.Module:
        return self.model.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.model.reset_classifier(num_classes, global_pool)


class BeitBackbone(ViTBackbone):
    """timm's BEiT: its attention adds a bias for each pair of places."""

    rigid = "its attention has a bias for each pair of its own tokens"

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        vit, patches = self.model, self.model.patch_embed(images)
        tokens = torch.cat([vit.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        tokens = vit.pos_drop(tokens if vit.pos_embed is None else tokens + vit.pos_embed)
        return tokens, () if vit.rel_pos_bias is None else (vit.rel_pos_bias(),)


class EvaBackbone(ViTBackbone):
    """timm's EVA: its attention turns queries and keys by their places."""

    rigid = "its attention turns each of its own tokens by its place"

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        tokens, rope = self.model._pos_embed(self.model.patch_embed(images))
        return self.model.norm_pre(tokens), () if rope is None else (rope,)


TIMM: dict[type[nn.Module], type[ViTBackbone]] = {
    VisionTransformer: ViTBackbone,
    Beit: BeitBackbone,
    Eva: EvaBackbone,
}


def as_transformer(model: Any) -> TokenBackbone:
    """A transformer whose blocks can be called one at a time.

    Raises:
        InputError: it has no row of blocks over [CLS; patches] that this package knows how to call.
    """
    if isinstance(model, TokenBackbone):
        return model
    name, backbone = type(model).__name__, next((TIMM[kind] for kind in TIMM if isinstance(model, kind)), None)
    if backbone is None:
        raise InputError(
            f"a {name} is none of the transformers whose blocks are known; "
            "take a ViT, DeiT, BEiT or EVA of timm's, or deepvit_*, crossvit_* or vit_micro"
        )
    reasons = {
        "its blocks hold several attentions side by side": not hasattr(model.blocks[0], "attn"),
        "its head attends to the tokens by an attention of its own": isinstance(
            getattr(model, "attn_pool", None), nn.Module
        ),
        "it drops patches while it trains, so that none has a place": isinstance(
            getattr(model, "patch_drop", None), PatchDropout
        ),
        "its rotary positions differ from block to block": getattr(model, "rope_mixed", False),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"this {name} cannot be fused: {reason}; take a plain ViT, DeiT, BEiT or EVA")
    return backbone(model)
