"""What suits a model, its data and its start better than a recipe's defaults."""

import re
from dataclasses import replace
from typing import Any

from tokenfusion.names import base_of, models_in
from tokenfusion.recipe import DEPTHS, Depth, Recipe

PRETRAINED_PAIR = "fuse(tf_efficientnet_lite0,vit_small_patch14_dinov2,probe)"
"""What begins with pretrained weights where no model is named; docs/pretrained.md says why these two."""


def preset(model: str, data: str, tune: str = "", pretrained: bool = False) -> dict[str, Any]:
    """The fields that suit a model's size and the built-in data better than Recipe's defaults.

    Args:
        model: its name, or "" when none was given.
        data, tune: as in Recipe.
        pretrained: whether it begins with pretrained weights.
    """
    values: dict[str, Any] = {}
    if pretrained and not model:
        model = PRETRAINED_PAIR
        values |= {"model": model, "img_size": (224, 224)}
    if pretrained and not tune and begins_as_line(model):
        tune = "auto"
        values |= {"tune": tune}
    if tune or pretrained:
        values |= KEPT_TOKENS if tune in DEPTHS[:-1] else FINE_TUNING
        values |= {"head_lr": 0.1} if tune else {}
        values |= {"crop_scale": 1.0, "hflip": 0.0} if tune and not pretrained else {}  # as its parents were judged
        return values | ({"hflip": 0.0} if data == "digits" else {})
    if data == "digits" and not model:
        values |= {"model": "tokenfusion_early_micro"}
    if data == "digits":  # 1,438 training images of 8×8 pixels; a mirrored digit is another sign
        values |= {
            "epochs": 40,
            "hflip": 0.0,
            "crop_scale": 0.6,
            "warmup_epochs": 2.0,
            "ema": 0.98,
        }
    elif all(name.endswith("_micro") for name in models_in(model)):
        values |= {"crop_scale": 0.7, "ema": 0.99}
    return values


def begins_as_line(model: str) -> bool:
    """Whether a model is `fuse(CNN,VIT,probe)`, which starts as a linear classifier on what its parents see."""
    return re.fullmatch(r"fuse\(.*,\s*probe\s*(,[^,()]*)?\)", base_of(model)) is not None


KEPT_TOKENS: dict[str, Any] = {
    "epochs": 8,
    "batch_size": 64,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.1,
    "warmup_epochs": 0.5,
    "mixup": 0.4,
    "label_smoothing": 0.0,
}
"""What suits training on kept tokens, from a linear classifier on (`benchmarks/pretrained.py`)."""
FINE_TUNING: dict[str, Any] = {
    "epochs": 5,
    "batch_size": 32,
    "optimizer": "adamw",
    "lr": 5e-4,
    "backbone_lr": 0.1,
    "layer_decay": 0.75,
    "warmup_epochs": 0.5,
    "ema": 0.99,
    "fix_batchnorm": True,
    "crop_scale": 0.5,
    "label_smoothing": 0.0,
}
"""What is usual for all weights of pretrained models: small rates, the smaller the nearer to the images."""


DEFAULTS = {name: Recipe.__dataclass_fields__[name].default for name in FINE_TUNING}
ON_KEPT_TOKENS: dict[str, Any] = DEFAULTS | KEPT_TOKENS
"""What training on kept tokens has in the place of every field of `FINE_TUNING`."""


def at_depth(recipe: Recipe, depth: Depth) -> Recipe:
    """The recipe of the depth that `tune` auto came to, which was filled in with what suits fine-tuning.

    Where the run only trains on kept tokens, fields that are as they were filled in become what suits that.
    """
    if depth == "all":
        return replace(recipe, tune=depth)
    filled = {name: value for name, value in FINE_TUNING.items() if getattr(recipe, name) in (value, DEFAULTS[name])}
    others = {name: value for name, value in KEPT_TOKENS.items() if name not in FINE_TUNING}
    changed = {name: ON_KEPT_TOKENS[name] for name in filled if name != "crop_scale"}
    changed |= {name: value for name, value in others.items() if getattr(recipe, name) == getattr(Recipe, name)}
    return replace(recipe, tune=depth, **changed)
