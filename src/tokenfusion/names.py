"""Names of models as words: several in one, separated by commas."""

from collections.abc import Sequence

from tokenfusion.errors import InputError


def split_names(words: Sequence[str]) -> list[str]:
    """Model names from words that hold several, separated by commas outside parentheses.

    Raises:
        InputError: a parenthesis without its partner.
    """
    names = [name for word in words for name in split_at_commas(word)]
    return list(dict.fromkeys(filter(None, names)))


def split_at_commas(text: str) -> list[str]:
    """The parts of a text between its commas outside parentheses.

    Raises:
        InputError: a parenthesis without its partner.
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise unmatched(text)
    return [part.strip() for part in parts]


def unmatched(text: str) -> InputError:
    return InputError(f"the parentheses of {text!r} do not match; write it as wide(resnet18,1.5) is, in quotes")


FUSED = ("tokenfusion_", "fuse(")
"""How names of fused models begin."""


def base_of(name: str) -> str:
    """The model that a variant is one of, NAME of `with(NAME,OPTION=VALUE,...)`; any other model is its own.

    Raises:
        InputError: a parenthesis without its partner.
    """
    function, bracket, inside = name.strip().partition("(")
    if function.strip() != "with" or not bracket or not inside.endswith(")"):
        return name.strip()
    return base_of(split_at_commas(inside[:-1])[0])


def is_fused(name: str) -> bool:
    """Whether a model fuses a CNN and a transformer, as its name says."""
    return base_of(name).startswith(FUSED)


def models_in(name: str) -> list[str]:
    """The models with names of their own that an expression is made of, such as both of `fuse(CNN,VIT,late)`.

    Raises:
        InputError: a parenthesis without its partner.
    """
    function, bracket, inside = name.strip().partition("(")
    if not bracket or not inside.endswith(")"):
        return [name.strip()]
    parts = split_at_commas(inside[:-1])
    several = {"fuse": 2, "mean": len(parts)}.get(function.strip(), 1)
    return [model for part in parts[:several] for model in models_in(part)]
