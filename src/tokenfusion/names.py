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
