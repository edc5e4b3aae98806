"""Text as a person reads it: counts with their nouns, durations, and names whose control characters are spelled out."""

from typing import Any

from rich.console import Console
from rich.text import Text

CONTROL_CHARACTERS = {
    code: repr(chr(code))[1:-1]
    for code in (*range(32), 127, *range(128, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\n\t"
}
"""What could move a terminal's cursor or turn the direction of a line, as Python writes it."""


def spelled_out(text: str) -> str:
    r"""A text whose control characters are spelled out, such as \x1b; lines stay lines."""
    return text.translate(CONTROL_CHARACTERS)


def abridged(text: str, longest: int) -> str:
    """A text of at most about so many characters: of a longer one its beginning and its end, and how long it is."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} … {text[-longest // 4 :]} ({len(text):,} characters)"


class PlainConsole(Console):
    """A console on which no name of a class or file can move the cursor, clear the screen or colour what follows."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Text as it is shown; rich's own colours come after it."""
        return super().render_str(spelled_out(text), **options)


def counted(n: int, noun: str) -> str:
    """A number with its noun, in the plural where that is due."""
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("s") else "s")


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {round(seconds) % 60} s"
