"""What the reports share: one HTML file without a script, a font or a link to anything outside it, and its words."""

import base64
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from tokenfusion.files import write_text
from tokenfusion_runtime.output import spelled_out

MAX_MISTAKES = 24
"""Mistakes that are shown as pictures at most."""
Thumbnails = Callable[[list[str]], dict[str, bytes]]
"""From names of images, as predictions.csv has them, to their PNG files by name, without what cannot be read."""
Picture = tuple[str, bool]
"""A PNG file as a data: address, or "", and whether it has so few pixels that they are better shown as squares."""


def write_page(path: Path, template: str, values: dict[str, Any]) -> None:
    """Write a page, whole or not at all.

    Args:
        path: the file.
        template: a file of this room, which extends `page.html`.
        values: what the template names.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"percent": percent, "visible": visible, "prose": prose, "name": name_of, "breakable": breakable}
    environment.filters |= filters
    page = environment.get_template(template).render(values)
    # a name that is not UTF-8 was read as surrogates, which a page cannot hold
    write_text(path, page.encode("utf-8", "replace").decode())


def pictures_of(names: list[str], thumbnails: Thumbnails | None) -> list[Picture]:
    """A picture of each image."""
    found = thumbnails(names) if thumbnails and names else {}
    return [picture(found.get(name, b"")) for name in names]


def picture(png: bytes) -> Picture:
    """A PNG file as a picture; without an address where it is none."""
    if not (png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 24):
        return "", False
    return f"data:image/png;base64,{base64.b64encode(png).decode()}", struct.unpack(">I", png[16:20])[0] < 64


def percent(share: float | None, decimals: int = 1) -> str:
    """A share in percent; a dash where it is undefined."""
    return "–" if share is None else f"{share * 100:.{decimals}f}%"


def visible(text: object) -> str:
    r"""A name with its newlines and other control characters spelled out, such as \n."""
    return spelled_out(str(text))


def prose(text: object) -> Markup:
    """Sentences, in which what stands between backticks is set as code, and long names may be broken."""
    broken = re.sub(r"\S{25,}", lambda word: with_breaks(word[0]), str(escape(visible(text))))
    return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", broken))


def breakable(text: object) -> Markup:
    """Text with long names, as of models and files, that may be broken behind their signs rather than amid words."""
    return Markup(with_breaks(str(escape(visible(text)))))


def with_breaks(escaped: str) -> str:
    """HTML without elements that may be broken behind signs which stand amid a word."""
    return re.sub(r"(?<=\w)([(,/_])(?=\S)", r"\1<wbr>", escaped)


def name_of(text: object) -> Markup:
    """A name as an element of its own, so that one written from right to left leaves what follows it alone."""
    return Markup("<bdi>{}</bdi>").format(visible(text))
