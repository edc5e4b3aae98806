"""Any CNN fused with any transformer, by their names or as modules already built."""

from math import isfinite
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from tokenfusion.errors import InputError
from tokenfusion.models.base import choose, image_size
from tokenfusion.models.operators import OPERATORS
from tokenfusion.models.presets import OPERATOR
from tokenfusion.models.registration import default_cfg
from tokenfusion.models.stages import MAX_STAGES, meta_tensors, walk_cnn
from tokenfusion.models.token_fusion import STRATEGIES, LayerwiseFusion, TokenFusion
from tokenfusion.models.walks import walk_transformer


class Rescale(nn.Module):
    """Images that were normalised for one model as another model wants them: (x·std + mean − mean') / std'."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the same shape."""
        return images * self.scale + self.shift


def fuse(
    cnn: str | nn.Module,
    vit: str | nn.Module,
    strategy: str = "layerwise",
    operator: str = "",
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    gate: float | None = None,
    drop_path_rate: float = 0.0,
    **kwargs: Any,
) -> TokenFusion:
    """Fuse a CNN and a transformer.

    Args:
        cnn: a name that `create_model` knows, or a module already built: any CNN of timm whose stages follow each other
            exchanges tokens both ways, any other with `forward_intermediates` gives its own.
        vit: the same: a ViT, DeiT, BEiT or EVA of timm, this package's DeepViT, CrossViT or ViT. Its head becomes the
            model's.
        strategy: "late", "early" or "layerwise".
        operator: "joint" (self-attention of all tokens), "cls" (CLS asks the pixels), "cross" (each asks the other) or
            "add" (at the same place); the strategy's own where not given, for early fusion with closed gates "cross".
        pretrained: begin with timm's weights.
        num_classes: outputs of the head; the transformer's own where not given.
        img_size: height and width in pixels; the transformer's own where not given.
        in_chans: channels of the images.
        gate: start of the gates that fused tokens pass. 0 leaves the transformer exactly as it is alone (but for early
            joint attention, which is not gated), 1 opens them; by default 0 where a parent is trained (`pretrained`,
            or a module), else 1.
        drop_path_rate: largest rate of stochastic depth of the transformer, where it is given by name.
        **kwargs: further arguments of the strategy's class: `fusion_depth` of the late one, `mlp_ratio`.

    Raises:
        InputError: an unknown name, strategy or operator; a pair that cannot be fused, with the reason.
    """
    model_cls = choose(STRATEGIES, strategy, "strategy")
    trained = pretrained or not (isinstance(cnn, str) and isinstance(vit, str))
    opened = (0.0 if trained else 1.0) if gate is None else float(gate)
    if not isfinite(opened):
        raise InputError(f"gate={gate} opens nothing; give 0 (closed) to 1 (open)")
    # joint attention at the entrance has no gate to close
    default = "cross" if strategy == "early" and not opened else OPERATOR[strategy]
    meet = choose(OPERATORS, operator or default, "operator")
    if isinstance(vit, str):
        vit = build_transformer(
            vit,
            img_size,
            num_classes=num_classes,
            in_chans=in_chans,
            pretrained=pretrained,
            drop_path_rate=drop_path_rate,
        )
    walk = walk_transformer(vit)
    if num_classes is not None and num_classes != vit.num_classes:
        vit.reset_classifier(num_classes)  # type: ignore[operator]
    size = image_size(img_size or native_size(vit))
    if isinstance(cnn, str):
        from tokenfusion.models import create_model

        cnn = create_model(cnn, in_chans=in_chans, img_size=size, **({"pretrained": True} if pretrained else {}))
    depth = len(walk.blocks(vit))
    config_cnn, config_vit = getattr(cnn, "default_cfg", None), getattr(vit, "default_cfg", None)
    staged = walk_cnn(cnn, size, in_chans, min(MAX_STAGES, depth) if model_cls is LayerwiseFusion else MAX_STAGES)
    try:
        model = model_cls(staged, vit, meet, img_size=size, in_chans=in_chans, gate=opened, **kwargs)
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{strategy} fusion cannot be built with {kwargs}: {error}; leave that out") from error
    require_size(model, size, in_chans)
    model.default_cfg = fused_config(config_vit, size, in_chans)  # type: ignore[assignment]
    if config_cnn and in_chans == 3:
        model.rescale = rescaled(model.default_cfg, config_cnn)
    return model


def build_transformer(name: str, img_size: int | tuple[int, int] | None, **arguments: Any) -> nn.Module:
    """A transformer by its name, one of timm's plain ones with positions that fit any image size."""
    from tokenfusion.models import create_model

    arguments = {key: value for key, value in arguments.items() if value or (key, value) == ("num_classes", 0)}
    if timm.is_model(name):
        with torch.device("meta"):
            plain = isinstance(timm.create_model(name), VisionTransformer)
        if plain:
            arguments |= {"dynamic_img_size": True, "dynamic_img_pad": True}
    return create_model(name, img_size=img_size, **arguments)


def require_size(model: TokenFusion, size: tuple[int, int], in_chans: int) -> None:
    """Refuse a pair that cannot take such images, before it is trained; nothing is computed."""
    training = model.training
    try:
        functional_call(model.eval(), meta_tensors(model), torch.empty(1, in_chans, *size, device="meta"))
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"the pair cannot take {in_chans}-channel images of {size[0]}×{size[1]} pixels: {reason}; "
            "give the transformer's own img_size and in_chans"
        ) from error
    finally:
        model.train(training)


def native_size(vit: nn.Module) -> tuple[int, int]:
    """Height and width that a transformer was built for."""
    own = getattr(vit, "img_size", None) or getattr(getattr(vit, "patch_embed", None), "img_size", None)
    if own is None:
        raise InputError(f"a {type(vit).__name__} does not say its image size; give img_size")
    return own


def fused_config(config: Any, size: tuple[int, int], in_chans: int) -> dict[str, Any]:
    """What timm's tools want to know of a fused model: as of its transformer."""
    base = default_cfg({"img_size": size[0]})
    if config:
        base |= {key: config[key] for key in ("mean", "std", "interpolation") if config.get(key)}
    return base | {"input_size": (in_chans, *size), "classifier": "vit.head"}


def rescaled(own: Any, theirs: Any) -> nn.Module:
    """The change from one model's normalisation to another's; none where they are the same."""
    if all(tuple(own[key]) == tuple(theirs[key]) for key in ("mean", "std")):
        return nn.Identity()
    mean, std, their_mean, their_std = (
        torch.tensor(config[key]) for config in (own, theirs) for key in ("mean", "std")
    )
    return Rescale(std / their_std, (mean - their_mean) / their_std)
