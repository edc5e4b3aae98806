"""Models by name or expression: built, listed; what no name is known of is refused with the nearest ones."""

import difflib
import fnmatch
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import timm
from timm.models import build_model_with_cfg, register_model
from torch import nn

from tokenfusion.errors import InputError
from tokenfusion.models import cmt, crossvit, deepvit, parents, presets
from tokenfusion.models.expressions import build_expression
from tokenfusion.models.pretrained import Pretrained, create_from, find_weights, weighted_names
from tokenfusion.models.registration import EXPRESSION, keep_expression

PAPERS = (presets, crossvit, deepvit, cmt, parents)


def list_models(pattern: str = "*") -> list[str]:
    """Names of this package's models that match a shell pattern, paper by paper."""
    return [name for paper in PAPERS for name in paper.VARIANTS if fnmatch.fnmatch(name, pattern)]


def list_timm(pattern: str) -> list[dict[str, Any]]:
    """timm's own models that match a shell pattern: `name`, and the `tags` of their pretrained weights."""
    tags: dict[str, list[str]] = {name: [] for name in timm.list_models(pattern) if name not in set(list_models())}
    for tagged in timm.list_models(pattern, pretrained=True) + timm.list_models(f"{pattern}.*", pretrained=True):
        name, _, tag = tagged.partition(".")
        if name in tags and tag not in tags[name]:
            tags[name].append(tag)
    return [{"name": name, "tags": found} for name, found in tags.items()]


def default_config(model: nn.Module) -> dict[str, Any]:
    """What timm's registry says of a built model: `input_size` (C, H, W), `mean`, `std` and more."""
    return cast(dict[str, Any], model.default_cfg)


def require_known(name: str) -> None:
    """Refuse a name that no model of this package or of timm has; the nearest are offered."""
    if "(" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
        listed = "`tokenfusion models` lists the names, `tokenfusion models --timm PATTERN` those of timm"
        hint = f"did you mean {', '.join(near)}?" if near else listed
        raise InputError(f"no model is called {name!r}; {hint}")


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
    pretrained: Pretrained = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a model of this package, or any of timm's, from random weights unless `pretrained` is given.

    Args:
        name: as `list_models` or timm gives it; or `fuse(CNN,VIT,STRATEGY)`, with an operator as a fourth item, see
            `fuse`; or a control, as `controls` says: `cnn(PRESET)`, `vit(PRESET)`, `wide(NAME,FACTOR)`; or a model
            with options of its class, `with(NAME,OPTION=VALUE,...)`.
        num_classes: outputs of the head; the variant's own when not given.
        in_chans: channels of the images.
        img_size: height and width in pixels that the model is made for; the variant's own when not given.
        pretrained: "hub" (or True) for timm's weights, or a `.safetensors` or `.pth` file of them; of `fuse(CNN,VIT)`
            two files, the CNN's first. A head of other classes than theirs is new.
        **kwargs: further arguments of the model's class, such as `drop_path_rate`.

    Raises:
        InputError: no such name (the nearest are offered), arguments that the model does not take, or a rate of dropout
            that is none; weights that cannot be had, or are another model's.
    """
    refuse_rates(kwargs)
    if "(" in name:
        if pretrained is not False:
            kwargs["pretrained"] = pretrained
            weighted_names(name)
        model = build_expression(name, num_classes=num_classes, in_chans=in_chans, img_size=img_size, **kwargs)
        return keep_expression(model, name, kwargs)
    require_known(name)
    arguments: dict[str, Any] = {"in_chans": in_chans, **kwargs}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    config = timm.get_pretrained_cfg(name)
    if img_size is not None and (config is None or config.fixed_input_size):  # plain CNNs take any size and no argument
        arguments["img_size"] = img_size
    try:
        if weights := find_weights(name, pretrained):
            return create_from(weights[0].path, name, arguments.pop("num_classes", None), arguments)
        return timm.create_model(name, **arguments)
    except TypeError as error:
        raise InputError(f"{name} cannot be built with {arguments}: {error}; leave that argument out") from error


def refuse_rates(arguments: Mapping[str, Any]) -> None:
    """Refuse rates of dropout (`drop_rate`, `drop_path_rate`, ...) that are not from 0 to 1."""
    for name, rate in arguments.items():
        if "drop" in name and name.endswith("_rate") and isinstance(rate, int | float) and not 0 <= rate <= 1:
            raise InputError(f"{name}={rate} is no rate; give a value from 0 to 1")


@register_model
def tokenfusion_expression(
    pretrained: bool = False, pretrained_cfg: Any = None, *, expression: str = "", **arguments: Any
) -> nn.Module:
    """What `create_model` builds of a model expression, under a name of timm's registry.

    timm finds a saved model by such a name (`local-dir:`, `hf-hub:`), and an expression is none.

    Raises:
        InputError: there is no expression, as of a model that was fused from modules.
    """
    if not expression:
        raise InputError("expression='' builds nothing; give one such as fuse(resnet18,vit_micro,late)")
    build = partial(create_model, expression)
    if not pretrained_cfg:
        ours = {key: value for key, value in arguments.items() if key not in ("cache_dir", "pretrained_cfg_overlay")}
        return build(**ours | ({"pretrained": True} if pretrained else {}))
    return build_model_with_cfg(build, EXPRESSION, pretrained, pretrained_cfg=pretrained_cfg, **arguments)
