"""Variants of a paper's models under their names in timm's registry."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

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


def entry_point(
    module: str,
    name: str,
    model_cls: Callable[..., nn.Module],
    config: Mapping[str, Any],
    features: Mapping[str, Any],
    read_pretrained: Filter | None,
) -> Any:
    """The function that timm calls to build the variant `name`."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        arguments = {**config, **kwargs}
        return build_model_with_cfg(
            model_cls, name, pretrained, pretrained_filter_fn=read_pretrained, feature_cfg=dict(features), **arguments
        )

    build.__name__ = build.__qualname__ = name
    build.__module__ = module
    build.__doc__ = f"{model_cls.__name__} with {dict(config)}."
    return build
