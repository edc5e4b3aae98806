"""A model with options of its class, as a model expression: `with(crossvit_micro,fusion=cls_sum,depths=(2,2))`.

So that what a paper compares can be named wherever a model is: `train --model`, `compare --models`, inside `fuse`.
"""

import ast
from typing import Any

from torch import nn

from tokenfusion.errors import InputError
from tokenfusion.models.create import create_model
from tokenfusion.models.expressions import BUILDERS

TASK = ("num_classes", "in_chans", "img_size", "pretrained")
"""What the data and the command decide, and no variant."""
REFUSALS = (AssertionError, RuntimeError, ValueError, TypeError)  # ours are InputErrors, timm's are any of these


def build_variant(name: str, *options: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The model `name` with options of its class, from random weights.

    Args:
        name: as `create_model` takes it.
        options: texts such as `fusion=cls_sum` or `depths=(2,2)`.
        pretrained: refused, for weights are those of a model without options.
        **arguments: those of `create_model`, which win over the options.

    Raises:
        InputError: an option that is none, or one that the model does not take; pretrained weights.
    """
    expression = f"with({','.join((name, *options))})"
    if pretrained:
        raise InputError(f"{expression} has no pretrained weights; leave pretrained out")
    chosen = dict(parse_option(option, expression) for option in options)
    try:
        return create_model(name, **(chosen | arguments))
    except InputError:
        raise
    except REFUSALS as error:
        raise InputError(f"{expression} cannot be built: {error}; try other options") from error


def parse_option(text: str, expression: str) -> tuple[str, Any]:
    """An option's name and its value: a number, a pair of numbers, None, True or False, or else a word.

    Raises:
        InputError: it has no name or no value, or is not the model's to choose.
    """
    option, equals, written = (part.strip() for part in text.partition("="))
    if not equals or not option.isidentifier() or not written:
        raise InputError(f"{text!r} in {expression} is no option; write OPTION=VALUE, such as fusion=cls_sum")
    if option in TASK:
        raise InputError(f"{option} in {expression} follows from the data and the command; leave it out there")
    try:
        return option, ast.literal_eval(written)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return option, written


BUILDERS["with"] = build_variant
