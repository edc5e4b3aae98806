"""What a fused model is compared with: its two parents, and either as wide as the fused model is costly.

A control is written as a model expression, a function's name with its arguments, and built from it:
`cnn(PRESET)` and `vit(PRESET)` are the two sides of a preset of this package, each a classifier of its own;
`wide(NAME,FACTOR)` is any model with its widths multiplied.
"""

import difflib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import nn

from tokenfusion.errors import InputError
from tokenfusion.models.base import image_size
from tokenfusion.models.cost import count_costs, count_macs, native_size
from tokenfusion.models.create import create_model, default_config
from tokenfusion.models.expressions import BUILDERS, CHECKED, parse
from tokenfusion.models.parents import FIRST_CONV, ResNet
from tokenfusion.models.presets import VARIANTS
from tokenfusion.models.registration import default_cfg, describe_built
from tokenfusion.models.transformer import ViT
from tokenfusion.models.widths import widen

TOLERANCE = 0.1  # of the fused model's multiply-adds; more is worth a note
ROLES = ("cnn", "vit", "wide_cnn", "wide_vit")
REFUSALS = (AssertionError, RuntimeError, ValueError)  # of models; ours are InputErrors, timm's are any of these


def build_wide(name: str, factor: str, *, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The model `name` with its widths times `factor`, from random weights; `arguments` are those of `create_model`.

    Raises:
        InputError: an impossible factor, no such model, a family whose widths are not known, or pretrained weights.
    """
    refuse_weights(f"wide({name},{factor})", pretrained)
    if name.startswith("wide("):
        raise InputError(f"wide({name},{factor}) is wide twice; give one factor")
    try:
        times = float(factor)
    except ValueError:
        times = 0.0
    if not (isfinite(times) and times > 0):
        raise InputError(f"factor {factor} of wide({name},{factor}) is no number above 0; try 1.5")

    def build(**widths: Any) -> nn.Module:
        return create_model(name, **(arguments | widths))

    model = f"wide({name},{factor}) {arguments}"
    try:
        with torch.device("meta"):
            plain = build()
            wide = widen(plain, times, build)
            if model not in CHECKED:
                size = image_size(arguments["img_size"] or default_config(plain)["input_size"][1:])
                # what does not fit together fails here, and not when training starts
                count_costs(wide, torch.empty(1, arguments["in_chans"], *size))
                CHECKED.add(model)
        return wide.train() if torch.get_default_device().type == "meta" else widen(plain, times, build)
    except InputError:
        raise
    except (*REFUSALS, AttributeError) as error:
        raise InputError(f"{name} cannot be {factor} times as wide: {error}; try another factor or model") from error


SIDES: dict[str, tuple[type[nn.Module], dict[str, str]]] = {  # class, and its arguments by the preset's names
    "cnn": (ResNet, {"stem": "stem", "strides": "conv_strides", "dims": "conv_dims", "depths": "conv_depths"}),
    "vit": (ViT, {key: key for key in ("patch_size", "dim", "depth", "heads", "mlp_ratio")}),
}
OF_VIT = SIDES["vit"][1] | {rate: rate for rate in ("drop_rate", "drop_path_rate")}
"""Options of a fused model that are its transformer's."""


def build_side(side: str, preset: str, *, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The CNN or the transformer of a preset alone, from random weights; `arguments` are those of `create_model`.

    Raises:
        InputError: no such preset, or pretrained weights.
    """
    refuse_weights(f"{side}({preset})", pretrained)
    if preset not in VARIANTS:
        near = difflib.get_close_matches(preset, VARIANTS, n=1, cutoff=0.0)[0]
        raise InputError(f"{preset!r} in {side}({preset}) is no fusion preset; did you mean {near}?")
    model_cls, names = SIDES[side]
    config: dict[str, Any] = VARIANTS[preset][1]
    own = {ours: config[theirs] for ours, theirs in names.items()}
    own |= {key: config[key] for key in ("img_size", "num_classes") if key in config}
    try:
        model: Any = model_cls(**own | {key: value for key, value in arguments.items() if value is not None})
    except TypeError as error:
        raise InputError(f"{side}({preset}) cannot be built with {arguments}: {error}; leave that out") from error
    model.pretrained_cfg = default_cfg(config) | {"first_conv": FIRST_CONV[side]}
    return describe_built(model)


def refuse_weights(expression: str, pretrained: bool) -> None:
    """Refuse pretrained weights, of which these models have none."""
    if pretrained:
        raise InputError(f"{expression} has no pretrained weights; leave pretrained out")


BUILDERS.update({"wide": build_wide, **{side: partial(build_side, side) for side in SIDES}})


@dataclass(frozen=True)
class Controls:
    """What a fused model is compared with, as model names and expressions.

    Attributes:
        cnn, vit: its parents; empty where missing.
        wide_cnn, wide_vit: the parents at the width where they cost as many multiply-adds as the fused model.
        missing: why a control is not there, by attribute.
        notes: what is to be said of a control that is there, by attribute.
    """

    cnn: str = ""
    vit: str = ""
    wide_cnn: str = ""
    wide_vit: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def controls_of(name: str, *, num_classes: int, in_chans: int = 3, img_size: tuple[int, int] | None = None) -> Controls:
    """The controls of a preset of this package, of `fuse(CNN,VIT,...)` or a variant; of others all are missing.

    Args:
        name, num_classes, in_chans: as in `create_model`.
        img_size: height and width in pixels that costs are compared at; the fused model's own when not given.

    Raises:
        InputError: it fuses two parents and cannot be built.
    """
    task: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    try:
        parents = parents_of(name)
    except InputError as error:
        return Controls(missing=dict.fromkeys(ROLES, str(error)))
    task["img_size"] = img_size or native_size(name)
    target = count_macs(name, **task)
    found: dict[str, str] = {}
    missing, notes = {}, {}
    for role, parent in zip(("wide_cnn", "wide_vit"), parents, strict=True):
        try:
            found[role], macs = widen_to(target, parent, task)
        except REFUSALS as error:
            missing[role] = str(error)
            continue
        if abs(macs / target - 1) > TOLERANCE:
            notes[role] = f"{macs:,} multiply-adds against the fused model's {target:,}: no width comes nearer"
    return Controls(*parents, **found, missing=missing, notes=notes)


def parents_of(name: str) -> tuple[str, str]:
    """The CNN and the transformer that a model fuses; those of a variant have the options that are theirs.

    Raises:
        InputError: it is no preset of this package, no `fuse(CNN,VIT,...)` and no variant of either.
    """
    if name in VARIANTS:
        return f"cnn({name})", f"vit({name})"
    function, arguments = parse(name) if "(" in name else ("", [])
    if function == "with":
        cnn, vit = parents_of(arguments[0])
        return with_options(cnn, SIDES["cnn"][1], arguments[1:]), with_options(vit, OF_VIT, arguments[1:])
    if function != "fuse":
        raise InputError(f"{name} is not a fusion of two parents")
    return arguments[0], arguments[1]


def with_options(parent: str, names: Mapping[str, str], options: Sequence[str]) -> str:
    """A parent with those of a fused model's options that are its own.

    Args:
        parent: the model.
        names: what its options are called there, by what they are called here.
        options: texts such as `depth=3`.
    """
    given = {option.partition("=")[0].strip(): option.partition("=")[2].strip() for option in options}
    own = [f"{ours}={given[theirs]}" for ours, theirs in names.items() if theirs in given]
    return f"with({','.join((parent, *own))})" if own else parent


def widen_to(target: int, name: str, task: dict[str, Any]) -> tuple[str, int]:
    """The expression `wide(name,FACTOR)` that costs most nearly `target` multiply-adds, and what it costs."""
    costs: dict[str, int] = {}

    def cost(hundredths: int) -> int:
        expression = f"wide({name},{hundredths / 100:.2f})"
        costs[expression] = count_macs(expression, **task)
        return costs[expression]

    # costs grow with the factor's square, or less where attention maps weigh
    ratio = target / count_macs(name, **task)
    low, high = sorted((ratio**0.5, ratio**0.8))
    bisect_left(range(max(int(90 * low), 1), int(110 * high) + 1), target, key=cost)
    return min(costs.items(), key=lambda item: abs(item[1] - target))
