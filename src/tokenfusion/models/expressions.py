"""Models written as a function and its arguments, such as `wide(resnet18,1.5)` or `fuse(resnet18,vit_micro,late)`."""

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from tokenfusion.errors import InputError
from tokenfusion.names import split_at_commas, unmatched

FUNCTIONS = {  # name: least and most arguments, and how it is written
    "fuse": (2, 4, "fuse(CNN,VIT,STRATEGY,OPERATOR)"),
    "wide": (2, 2, "wide(NAME,FACTOR)"),
    "with": (2, 99, "with(NAME,OPTION=VALUE,...)"),
    "cnn": (1, 1, "cnn(PRESET)"),
    "vit": (1, 1, "vit(PRESET)"),
}

Build = Callable[..., nn.Module]
BUILDERS: dict[str, Build] = {}
"""What builds a function's model from its arguments, which are texts, and those of `create_model`: `fuse.py`,
`controls.py` and `variants.py` each bring their own."""


CHECKED: set[str] = set()
"""Expressions with their arguments that were tried on the meta device and found to fit: once a process is enough."""


def build_expression(expression: str, **arguments: Any) -> nn.Module:
    """Build what a model expression says.

    Args:
        expression: as `parse` takes it.
        **arguments: those of `create_model`.

    Raises:
        InputError: an expression that `parse` refuses, or that cannot be built.
    """
    function, parts = parse(expression)
    return BUILDERS[function](*parts, **arguments)


def parse(expression: str) -> tuple[str, list[str]]:
    """A model expression's function and its arguments, which may be expressions themselves.

    Raises:
        InputError: parentheses that do not match, an unknown function, a wrong number of arguments.
    """
    head, _, rest = expression.strip().partition("(")
    inside = rest.removesuffix(")")
    if inside == rest:
        raise unmatched(expression)
    function, arguments = head.strip(), split_at_commas(inside)
    if function not in FUNCTIONS:
        near = difflib.get_close_matches(function, FUNCTIONS, n=1, cutoff=0.0)[0]
        raise InputError(f"{function!r} in {expression!r} is no function of models; did you mean {near}?")
    least, most, form = FUNCTIONS[function]
    if not least <= len(arguments) <= most or not all(arguments):
        raise InputError(f"{expression!r} has {len(arguments)} arguments, or an empty one; write {form}")
    return function, arguments
