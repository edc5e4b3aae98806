"""Models written as a function and its arguments, such as `wide(resnet18,1.5)` or `fuse(resnet18,vit_micro,late)`."""

import difflib

from tokenfusion.errors import InputError

FUNCTIONS = {  # name: least and most arguments, and how it is written
    "fuse": (2, 4, "fuse(CNN,VIT,STRATEGY,OPERATOR)"),
    "wide": (2, 2, "wide(NAME,FACTOR)"),
    "cnn": (1, 1, "cnn(PRESET)"),
    "vit": (1, 1, "vit(PRESET)"),
}


def parse(expression: str) -> tuple[str, list[str]]:
    """A model expression's function and its arguments, which may be expressions themselves.

    Raises:
        InputError: parentheses that do not match, an unknown function, a wrong number of arguments.
    """
    head, _, inside = expression.strip().partition("(")
    function, arguments, depth = head.strip(), [""], 0
    for letter in inside.removesuffix(")"):
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if letter == "," and not depth:
            arguments.append("")
        else:
            arguments[-1] += letter
    if depth or not inside.endswith(")"):
        raise InputError(f"the parentheses of {expression!r} do not match; write it as wide(resnet18,1.5) is")
    if function not in FUNCTIONS:
        near = difflib.get_close_matches(function, FUNCTIONS, n=1, cutoff=0.0)[0]
        raise InputError(f"{function!r} in {expression!r} is no function of models; did you mean {near}?")
    least, most, form = FUNCTIONS[function]
    arguments = [argument.strip() for argument in arguments]
    if not least <= len(arguments) <= most or not all(arguments):
        raise InputError(f"{expression!r} has {len(arguments)} arguments, or an empty one; write {form}")
    return function, arguments
