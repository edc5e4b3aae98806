"""Draw `docs/fusion.svg`: where the tokens of a CNN and of a transformer meet, strategy by strategy.

    python docs/fusion_drawing.py

Plain SVG, in the colours of a light or of a dark page; a label that does not fit into its box is refused.
"""

from html import escape
from pathlib import Path

from tokenfusion.models.token_fusion import STRATEGIES

DRAWING = Path(__file__).parent / "fusion.svg"
PANEL, HEIGHT, FONT = 280, 346, 13
LETTER = 0.6 * FONT
"""Pixels of a letter, on average at most."""
ROW, BOX = 52, 32
"""Pixels from one row of boxes to the next, and their height."""
CNN, VIT, NARROW, WIDE = 16, 160, 104, 248
"""Left edges of the two sides in a panel, and widths of a box: of one side, and of both together."""
STYLE = f"""
text {{ font: {FONT}px system-ui, sans-serif; fill: #1c2733; text-anchor: middle }}
.title {{ font-weight: 600 }} .cnn {{ fill: #cfe3fa }} .vit {{ fill: #fbe3c8 }} .both {{ fill: #d9eed7 }}
.plain {{ fill: #e9edf1 }} rect {{ stroke: #8694a3 }} path {{ stroke: #5b6773; fill: none; stroke-width: 1.4 }}
marker path {{ fill: #5b6773 }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }} .cnn {{ fill: #1f3f63 }} .vit {{ fill: #5c3d17 }} .both {{ fill: #274c2b }}
.plain {{ fill: #2b323a }} rect {{ stroke: #76828f }} path {{ stroke: #a5b0bb }} marker path {{ fill: #a5b0bb }}
}}"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{named}>{escape(words)}</text>'


def box(x: float, row: float, width: float, words: str, kind: str) -> str:
    """A labelled box at a row; ValueError where the label is too long for it."""
    if len(words) * LETTER > width - 8:
        raise ValueError(f"{words!r} does not fit into {width:g} pixels; shorten it")
    y = 44 + row * ROW
    frame = f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{BOX}" rx="6"/>'
    return frame + text(x + width / 2, y + BOX / 2 + FONT * 0.35, words)


def down(x: float, row: float, to: float) -> str:
    """An arrow from a box at a row down to a box at another."""
    return f'<path marker-end="url(#tip)" d="M{x:g} {44 + row * ROW + BOX:g}V{44 + to * ROW - 3:g}"/>'


def between(row: float) -> str:
    """An arrow both ways between the two sides at a row."""
    y = 44 + row * ROW + BOX / 2
    tips = 'marker-start="url(#tip)" marker-end="url(#tip)"'
    return f'<path {tips} d="M{CNN + NARROW + 3:g} {y:g}H{VIT - 3:g}"/>'


LEFT, RIGHT, MIDDLE = CNN + NARROW / 2, VIT + NARROW / 2, CNN + WIDE / 2
END = 5


def sides(*rows: tuple[str, str]) -> list[str]:
    """The image, and below it the two sides, row by row."""
    parts = [box(CNN, 0, WIDE, "image", "plain")]
    for row, (cnn, vit) in enumerate(rows, start=1):
        parts += [box(CNN, row, NARROW, cnn, "cnn"), box(VIT, row, NARROW, vit, "vit")]
        parts += [down(LEFT, row - 1, row), down(RIGHT, row - 1, row)]
    return parts


def early() -> list[str]:
    return [
        *sides(("CNN", "patches"), ("pixel tokens", "patch tokens")),
        *(down(x, 2, 3) for x in (LEFT, RIGHT)),
        box(CNN, 3, WIDE, "transformer on both kinds", "both"),
        down(MIDDLE, 3, 4),
        box(CNN, 4, WIDE, "transformer on both kinds", "both"),
        down(MIDDLE, 4, END),
    ]


def late() -> list[str]:
    return [
        *sides(("CNN stage 1", "patches"), ("CNN stage 2", "blocks"), ("CNN stage 3", "blocks")),
        *(down(x, 3, 4) for x in (LEFT, RIGHT)),
        box(CNN, 4, WIDE, "tokens attend to each other", "both"),
        down(MIDDLE, 4, END),
    ]


def layerwise() -> list[str]:
    return [
        *sides(("CNN stage 1", "blocks"), ("CNN stage 2", "blocks"), ("CNN stage 3", "blocks")),
        *(between(row) for row in (1, 2, 3)),
        *(down(x, 3, 4) for x in (LEFT, RIGHT)),
        box(CNN, 4, WIDE, "CLS, and the mean pixel", "both"),
        down(MIDDLE, 4, END),
    ]


PANELS = {"early": early, "late": late, "layerwise": layerwise}


def draw() -> str:
    """The whole picture."""
    assert PANELS.keys() == STRATEGIES.keys(), "draw every strategy"
    width = PANEL * len(PANELS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}"'
        f' role="img" aria-label="Where tokens meet: {", ".join(PANELS)}">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5"'
        ' orient="auto-start-reverse"><path d="M0 0L8 4L0 8z"/></marker></defs>',
    ]
    for number, (name, panel) in enumerate(PANELS.items()):
        inside = [text(MIDDLE, 26, name, "title"), *panel(), box(CNN, END, WIDE, "head: the classes' scores", "plain")]
        parts.append(f'<g transform="translate({number * PANEL} 0)">{"".join(inside)}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    DRAWING.write_text(draw())
