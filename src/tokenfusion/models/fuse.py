"""Any CNN fused with any transformer, by their names or as modules already built."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenfusion.errors import InputError, first_line
from tokenfusion.layers.positions import Grid
from tokenfusion.models.adapters import MAX_STAGES, as_cnn, as_transformer
from tokenfusion.models.backbones import CNNBackbone, TokenBackbone
from tokenfusion.models.base import choose, image_size, on_meta
from tokenfusion.models.create import create_model
from tokenfusion.models.expressions import BUILDERS, CHECKED
from tokenfusion.models.fused_model import FusedModel
from tokenfusion.models.operators import OPERATORS, Operator
from tokenfusion.models.presets import OPERATOR as PRESET_OPERATOR
from tokenfusion.models.pretrained import HUB, Pretrained, choices, swapped
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.models.registration import default_cfg, keep_expression
from tokenfusion.models.token_fusion import STRATEGIES, LayerwiseFusion, Strategy, strategy_class
from tokenfusion.names import base_of

FUSABLE: dict[str, Strategy] = {**STRATEGIES, "probe": ProbeFusion}
"""Strategies that any pair is fused by; `probe` is for parents that are trained, and has no presets."""
OPERATOR = {**PRESET_OPERATOR, "probe": "query"}


def fuse(
    cnn: str | nn.Module,
    vit: str | nn.Module,
    strategy: str = "layerwise",
    operator: str = "",
    *,
    pretrained: Pretrained = False,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    gate: float | None = None,
    drop_path_rate: float = 0.0,
    **kwargs: Any,
) -> FusedModel:
    """Fuse a CNN and a transformer.

    Args:
        cnn: a name that `create_model` knows, or a module already built, which becomes a part of the result: any CNN
            of timm whose stages follow each other exchanges tokens both ways, any other with `forward_intermediates`
            gives its own.
        vit: the same: a ViT, DeiT, BEiT or EVA of timm, this package's DeepViT, CrossViT or ViT. Its head becomes the
            model's.
        strategy: "late", "early", "layerwise", or "probe": late, from a linear classifier on both trained parents.
        operator: "joint" (self-attention of all tokens), "cls" (CLS attends to the pixels), "cross" (each attends to
            the other), "add" (at the same place) or "query" (learned queries attend to both); where not given the
            strategy's own: "joint" for late and early fusion, "add" for layerwise, "query" for "probe". Early joint
            attention is not gated: give "cross" to start as the transformer.
        pretrained: "hub" (or True) to begin with timm's weights, or files of them, for each parent given by its name,
            the CNN's first.
        num_classes: outputs of the head; the transformer's own where not given.
        img_size: height and width in pixels; the transformer's own where not given.
        in_chans: channels of the images.
        gate: start of the gates that fused tokens pass. 0 leaves the transformer exactly as it is alone (but for early
            joint attention, which is not gated), 1 opens them; by default 0 where a parent is trained (`pretrained`,
            or a module), else 1.
        drop_path_rate: largest rate of stochastic depth of the transformer, where it is given by name.
        **kwargs: further arguments of the strategy's class: `fusion_depth` of the late one, `mlp_ratio`.

    Raises:
        InputError: an unknown name, strategy or operator; a pair that cannot be fused, with the reason. Modules that
            were given are then as they were.
    """
    choose(FUSABLE, strategy, "strategy")
    meet = choose(OPERATORS, operator or OPERATOR[strategy], "operator")
    by_name = isinstance(cnn, str) and isinstance(vit, str)
    name = f"fuse({cnn},{vit},{strategy},{operator or OPERATOR[strategy]})" if by_name else ""
    opened = gate_start(gate, trained=bool(pretrained) or not by_name)
    named = [parent for parent in (cnn, vit) if isinstance(parent, str)]
    weights = dict(zip(named, choices(named, pretrained), strict=True)) if pretrained else {}
    try:
        vit = build_transformer(
            vit,
            img_size,
            num_classes=num_classes,
            in_chans=in_chans,
            pretrained=weights.get(vit, False) if isinstance(vit, str) else False,
            drop_path_rate=drop_path_rate,
        )
        size = image_size(img_size or native_size(as_transformer(vit)))
        cnn = build_cnn(cnn, size, in_chans, weights.get(cnn, False) if isinstance(cnn, str) else False)
    except InputError as error:
        raise (swapped(weights) if HUB not in weights.values() else None) or error from error.__cause__
    task: dict[str, Any] = {"num_classes": num_classes, "img_size": size, "in_chans": in_chans, "gate": opened}
    assembled: Callable[..., FusedModel] = partial(assemble, strategy=strategy, operator=meet, further=kwargs, **task)
    pair, tried = f"{name} {task} {kwargs}", None
    if not by_name or pair not in CHECKED:
        with torch.device("meta"):  # what is refused is refused to copies without weights
            copies = assembled(on_meta(cnn), on_meta(vit))
            require_size(copies, size, in_chans)
        CHECKED.add(pair)
        tried = copies.cnn
    model = assembled(cnn, vit, tried=tried)
    keep_expression(model, name, kwargs)
    return model


def gate_start(gate: float | None, trained: bool) -> float:
    """What the gates start with; where not given, closed to protect parents that are trained."""
    opened = (0.0 if trained else 1.0) if gate is None else float(gate)
    if not isfinite(opened):
        raise InputError(f"gate={gate} opens nothing; give 0 (closed) to 1 (open)")
    return opened


def assemble(
    cnn: nn.Module,
    vit: nn.Module,
    *,
    strategy: str,
    operator: type[Operator],
    num_classes: int | None,
    img_size: Grid,
    in_chans: int,
    gate: float,
    further: dict[str, Any],
    tried: CNNBackbone | None = None,
) -> FusedModel:
    """Take the parents apart and put them together; arguments as in `fuse`, with `further` ones of the class and the
    CNN of copies that were `tried` before."""
    transformer = as_transformer(vit)
    configs = [getattr(parent, "default_cfg", None) or {} for parent in (vit, cnn)]
    first_convs = [*first(cnn, configs[1]), *first(vit, configs[0])]
    if num_classes is not None and num_classes != transformer.num_classes:
        transformer.reset_classifier(num_classes)
    layerwise = FUSABLE[strategy] is LayerwiseFusion
    stages = min(MAX_STAGES, len(transformer.blocks)) if layerwise else MAX_STAGES
    backbone = as_cnn(cnn, img_size, in_chans, stages, tried)
    config = fused_config(configs[0], img_size, in_chans)
    if configs[1]:
        backbone.rescale = rescaled(config, configs[1], in_chans)
    arguments: dict[str, Any] = {"img_size": img_size, "in_chans": in_chans, "gate": gate} | further
    try:
        model = strategy_class(FUSABLE[strategy], operator)(backbone, transformer, operator, **arguments)
    except (TypeError, RuntimeError) as error:
        if not further:
            raise
        raise InputError(f"{strategy} fusion cannot be built with {further}: {error}; leave that out") from error
    heads: Any = model.get_classifier()  # DeiT has two
    head = [layer for part in (heads if isinstance(heads, tuple) else (heads,)) for layer in part.modules()]
    names = {module: name for name, module in model.named_modules()}
    model.pretrained_cfg = config | {  # type: ignore[assignment]
        "num_classes": model.num_classes,
        "first_conv": tuple(names[conv] for conv in first_convs if conv in names),
        "classifier": tuple(names[layer] for layer in head if isinstance(layer, nn.Linear)),
    }
    model.default_cfg = model.pretrained_cfg
    return model


def build_cnn(cnn: str | nn.Module, size: Grid, in_chans: int, pretrained: Pretrained) -> nn.Module:
    """A CNN by its name, or as it is given."""
    if isinstance(cnn, nn.Module):
        return cnn
    return create_model(cnn, in_chans=in_chans, img_size=size, pretrained=pretrained)


def build_transformer(vit: str | nn.Module, img_size: int | Grid | None, **arguments: Any) -> nn.Module:
    """A transformer by its name, one of timm's plain ones with positions that fit any image size; or as it is given."""
    if isinstance(vit, nn.Module):
        return vit
    arguments = {key: value for key, value in arguments.items() if value or (key, value) == ("num_classes", 0)}
    if timm.is_model(base := base_of(vit)):
        with torch.device("meta"):
            plain = isinstance(timm.create_model(base), VisionTransformer)
        if plain:
            arguments |= {"dynamic_img_size": True, "dynamic_img_pad": True}
    return create_model(vit, img_size=img_size, **arguments)


def require_size(model: FusedModel, size: tuple[int, int], in_chans: int) -> None:
    """Refuse a pair, given on the meta device, that cannot take such images."""
    try:
        model.eval()(torch.empty(1, in_chans, *size, device="meta"))
    except (AssertionError, RuntimeError) as error:
        reason = first_line(error)
        raise InputError(
            f"the pair cannot take {in_chans}-channel images of {size[0]}×{size[1]} pixels: {reason}; "
            "give the transformer's own img_size and in_chans"
        ) from error


def native_size(vit: TokenBackbone) -> Grid:
    """Height and width that a transformer was built for."""
    if vit.img_size is None:  # timm's may be built without
        raise InputError("the transformer does not say its image size; give img_size")
    return vit.img_size


def fused_config(config: Mapping[str, Any], size: Grid, in_chans: int) -> dict[str, Any]:
    """What timm's tools want to know of a fused model, as of its transformer."""
    kept = {key: config[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode") if config.get(key)}
    return default_cfg({"img_size": size[0]}) | kept | {"input_size": (in_chans, *size)}


def first(parent: nn.Module, config: Mapping[str, Any]) -> list[nn.Module]:
    """The layers of a parent that read images, by its config."""
    names = config.get("first_conv") or ()
    return [parent.get_submodule(name) for name in ((names,) if isinstance(names, str) else names)]


def rescaled(own: Any, theirs: Any, in_chans: int) -> nn.Module:
    """The change from one model's normalisation to another's, of grays by their means; none where they are the same."""
    if all(tuple(own[key]) == tuple(theirs[key]) for key in ("mean", "std")):
        return nn.Identity()
    mean, std, their_mean, their_std = (
        tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans
        for values in (config[key] for config in (own, theirs) for key in ("mean", "std"))
    )
    stds = list(zip(std, their_std, strict=True))
    shifts = zip(mean, their_mean, stds, strict=True)
    return Rescale([a / b for a, b in stds], [(a - b) / theirs for a, b, (_, theirs) in shifts])


class Rescale(nn.Module):
    """Images that were normalised for one model as another model wants them: (x·std + mean − mean') / std'."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Sequence[float], shift: Sequence[float]) -> None:
        super().__init__()
        self.values = {"scale": tuple(scale), "shift": tuple(shift)}
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Make what is in no file of weights anew; timm's name, which loaders call after a model was built on meta."""
        for name, values in self.values.items():
            old = getattr(self, name, None)
            device = None if old is None else old.device
            self.register_buffer(name, torch.tensor(values, device=device).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the same shape."""
        return images * self.scale + self.shift


BUILDERS["fuse"] = fuse
