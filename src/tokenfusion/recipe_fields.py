"""What a recipe's fields may be: ranges of numbers, and values of the types that are stated."""

import dataclasses
import difflib
import functools
from collections.abc import Collection, Container, Mapping
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from tokenfusion.errors import InputError

INFINITY = float("inf")
MAX_SIDE = 16_384
"""Longest side of a model's input, in pixels."""
RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, 100_000),
    "batch_size": (0, 1_000_000),
    "accumulate": (1, 1_000_000),
    "lr": (1e-12, 100),
    "tune_minutes": (0, 100_000),
    "views": (1, 1000),
    "min_lr": (0, 100),
    "backbone_lr": (0, 100),
    "head_lr": (0, 100),
    "layer_decay": (0, 1),
    "warmup_epochs": (0, 100_000),
    "weight_decay": (0, 100),
    "clip_grad": (0, INFINITY),
    "ema": (0, 0.999999),
    "patience": (0, 100_000),
    "crop_scale": (0.01, 1),
    "eval_crop": (0, 1),
    "crop_padding": (0, 100_000),
    "hflip": (0, 1),
    "rand_augment": (0, 10),
    "color_jitter": (0, 1),
    "random_erasing": (0, 1),
    "repeats": (1, 1000),
    "mixup": (0, 100),
    "cutmix": (0, 100),
    "mix_prob": (0, 1),
    "label_smoothing": (0, 0.99),
    "drop_path": (0, 0.99),
    "branch_dropout": (0, 1),
    "side_loss": (0, 100),
    "seed": (0, 2**63 - 1),
    "workers": (0, 256),
    "val_fraction": (0.01, 0.9),
    "max_skipped": (0, 1),
    "max_pixels": (1, 2**40),
    "cache_mb": (0, 2**40),
    "save_minutes": (0, INFINITY),
    "every": (0, 100_000),
}

LISTS = {
    int: "whole numbers, such as [128, 96]",
    float: "numbers, such as [0, 4095]",
    str: 'texts, such as ["runs/cnn", "runs/vit"]',
}
"""What a field that is a tuple may hold, by the type of its items."""


Fields = TypeVar("Fields", bound=type)


def named_fields(kind: Fields) -> Fields:
    """A dataclass that refuses a field it does not have in words, where Python raises a TypeError."""
    made, described = cast(Any, kind).__init__, dataclasses.fields(cast(Any, kind))
    known = [field.name for field in described]
    in_order = [field.name for field in described if not field.kw_only]

    @functools.wraps(made)
    def init(self: Any, *values: Any, **fields: Any) -> None:
        for name in fields:
            if name not in known:
                raise InputError(f"{kind.__name__}: {no_field(name, known)}")
        if len(values) > len(in_order):
            raise InputError(
                f"{kind.__name__}: {values[len(in_order)]!r} stands behind {', '.join(in_order) or 'nothing'}, where "
                "fields have to be named; write model=..., as an example"
            )
        made(self, *values, **fields)

    cast(Any, kind).__init__ = init
    return kind


def no_field(name: str, known: Collection[str]) -> str:
    """What to say of a field that there is not: the nearest, or all that there are."""
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"known fields: {', '.join(known)}"
    return f"no field is called {name!r}; {remedy}"


def require_value_range(values: tuple[Any, ...]) -> None:
    """Refuse what is no range of values, InputError."""
    numbers = all(type(value) in (int, float) and abs(value) < 1e30 for value in values)
    if not numbers or len(values) != 2 or values[0] >= values[1]:
        raise InputError(f"value_range={values} is no range; give its lowest and its highest value, such as 0 4095")


def of_their_types(values: Mapping[str, Any], kinds: Mapping[str, Any], autos: Container[str]) -> dict[str, Any]:
    """Fields with values of their types; whole numbers pass as floats.

    Args:
        values: of some fields, by name.
        kinds: the types of all fields.
        autos: fields that may be "auto".

    Raises:
        InputError: a value of another type, or that is not among a field's choices.
    """
    result = dict(values)
    for name, value in values.items():
        kind = kinds[name]
        if name in autos:
            if value == "auto":
                continue
            kind = get_args(kind)[0]
        if kind is float and type(value) is int:
            result[name] = float(value)
        elif get_origin(kind) is Literal:
            if repr(value) not in map(repr, get_args(kind)):  # 1.0 and True are equal to 1
                options = ", ".join(map(str, get_args(kind)))
                raise InputError(f"{name}={value!r} is not known; choose one of: {options}")
        elif get_origin(kind) is tuple:
            items = value if isinstance(value, list | tuple) else (value,)
            item_kind = get_args(kind)[0]
            items = [float(item) if item_kind is float and type(item) is int else item for item in items]
            if get_origin(item_kind) is Literal:
                unknown = [item for item in items if item not in get_args(item_kind)]
                if unknown:
                    options = ", ".join(get_args(item_kind))
                    raise InputError(f"{name}={unknown[0]!r} is not known; choose from: {options}")
            elif not all(type(item) is item_kind for item in items):
                raise InputError(f"{name}={value!r} must be {LISTS[item_kind]}")
            result[name] = tuple(items)
        elif type(value) is not kind:
            raise InputError(
                f"{name}={value!r} is of type {type(value).__name__}; give a value of type {kind.__name__}"
            )
    return result
