"""Variants of a paper's models under their names in timm's registry."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from tokenfusion.models.base import PaperModel

EXPRESSION = "tokenfusion_expression"
"""The name under which timm finds what is built of a model expression."""

Filter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


def register_variants(
    module: str,
    variants: Mapping[str, tuple[Callable[..., nn.Module], Mapping[str, Any]]],
    *,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    out_indices: tuple[int, ...] | None = None,
    read_pretrained: Filter | None = None,
) -> None:
    """Register every variant with timm, so that `timm.create_model(name)` builds it.

    Args:
        module: `__name__` of the paper's module.
        variants: name to (model class or function, keyword arguments); `img_size` among them is the native square size.
        configs: name to what differs from `default_cfg`.
        out_indices: the features that `features_only=True` gives unless told otherwise.
        read_pretrained: turns a file's state dict into the model's.
    """
    paper = sys.modules[module]
    paper.default_cfgs = getattr(paper, "default_cfgs", {}) | generate_default_cfgs(  # type: ignore[attr-defined]
        {name: default_cfg(config) | dict((configs or {}).get(name, {})) for name, (_, config) in variants.items()}
    )
    features: dict[str, Any] = {"feature_cls": "getter"}
    if out_indices:
        features["out_indices"] = out_indices
    for name, (model_cls, config) in variants.items():
        entry = entry_point(module, name, model_cls, config, features, read_pretrained)
        setattr(paper, name, register_model(entry))


def default_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's tools want to know of a variant."""
    return {
        "url": "",
        "num_classes": config.get("num_classes", 1000),
        "input_size": (3, config["img_size"], config["img_size"]),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "fixed_input_size": True,  # so that timm passes img_size on; any size may be given to forward
        "classifier": "head",
    }


def describe_built(model: nn.Module) -> nn.Module:
    """Make a model's `pretrained_cfg` say what it is: its own size, channels and classes; gives the model back."""
    built: Any = model
    config = dict(built.pretrained_cfg)
    mean, std, in_chans = config["mean"], config["std"], built.in_chans
    config |= {"input_size": (in_chans, *built.img_size), "num_classes": built.num_classes}
    if in_chans != len(mean):  # grays are of the colours' mean
        config |= {"mean": (sum(mean) / len(mean),) * in_chans, "std": (sum(std) / len(std),) * in_chans}
    if config.get("pool_size"):
        config["pool_size"] = built.token_layout()[-1].grid
    built.pretrained_cfg = built.default_cfg = config
    return model


def keep_expression(model: nn.Module, expression: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Note what a model was built of where timm looks for it when it saves one; gives the model back.

    Args:
        model: has a `pretrained_cfg`.
        expression: what `create_model` builds it of again; "" of a model that was made of modules.
        arguments: further ones of the model's class.
    """
    built: Any = model
    built.pretrained_cfg = built.default_cfg = built.pretrained_cfg | {"architecture": EXPRESSION}
    shape = {key: value for key, value in arguments.items() if key not in ("pretrained", "gate") and "_rate" not in key}
    built._model_args = ({"expression": expression} if expression else {}) | shape
    return model


def entry_point(
    module: str,
    name: str,
    model_cls: Callable[..., nn.Module],
    config: Mapping[str, Any],
    features: Mapping[str, Any],
    read_pretrained: Filter | None,
) -> Any:
    """The function that timm calls to build the variant `name`."""

    # classes and size are in the config that timm gives, which may be a saved folder's own
    fixed = {key: value for key, value in config.items() if key not in ("num_classes", "img_size")}

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        arguments = {**fixed, **kwargs}
        global_pool = arguments.pop("global_pool", None)
        model = build_model_with_cfg(
            model_cls, name, pretrained, pretrained_filter_fn=read_pretrained, feature_cfg=dict(features), **arguments
        )
        if not isinstance(model, PaperModel):  # timm's wrapper, which gives features only
            return model
        if global_pool is not None:
            model.reset_classifier(model.num_classes, global_pool)
        return describe_built(model)

    build.__name__ = build.__qualname__ = name
    build.__module__ = module
    build.__doc__ = f"{model_cls.__name__} with {dict(config)}."
    return build
