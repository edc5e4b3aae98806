"""Draw `docs/rooms.svg`: the rooms of the package from the top floor down, and what imports what.

    python docs/rooms.py

Floors are the layers of the import contract in `pyproject.toml`; arrows are the imports themselves, but for those that
a chain of others implies, and for those of the lowest floors, which every room uses.
"""

import tomllib
from itertools import permutations
from pathlib import Path

import grimp
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

DOCS = Path(__file__).parent
PACKAGE = "tokenfusion"
CONTRACT = "rooms import downward only"
COLOURS = ("#e8f0fb", "#f3f6fa")
WIDTH, LINE, WRAP = 12.0, 0.19, 34
"""Inches across, inches of a line of text, and letters in a line of a room's files."""


def floors() -> list[list[str]]:
    """The rooms of each floor, the highest floor first."""
    contracts = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["name"] == CONTRACT)
    return [[room.strip().removeprefix(f"{PACKAGE}.") for room in layer.split("|")] for layer in layers]


def arrows(rooms: list[str]) -> set[tuple[str, str]]:
    """Pairs (room, room that it imports), without those that follow from others."""
    graph = grimp.build_graph(PACKAGE)
    for room in rooms:
        graph.squash_module(f"{PACKAGE}.{room}")
    direct = {
        (one, other)
        for one, other in permutations(rooms, 2)
        if graph.direct_import_exists(importer=f"{PACKAGE}.{one}", imported=f"{PACKAGE}.{other}")
    }
    reached = {room: {other for one, other in direct if one == room} for room in rooms}
    for _ in rooms:
        reached = {room: below | {far for other in below for far in reached[other]} for room, below in reached.items()}
    return {(a, b) for a, b in direct if not any((a, c) in direct and b in reached[c] for c in rooms if c != b)}


def files(room: str) -> list[str]:
    """Names of a room's files, in lines of some length."""
    folder = DOCS.parent / "src" / PACKAGE / room
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    names += sorted(f"{path.parent.name}/" for path in folder.glob("*/__init__.py"))
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > WRAP:
            lines.append("")
        lines[-1] += f"{name}  "
    return [line.strip() for line in lines if line]


def draw(path: Path) -> None:
    """Write the picture."""
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": PACKAGE, "font.family": "sans-serif"}
    levels = floors()
    everywhere = levels.index(["layers"]) + 1
    drawn = [room for floor in levels[:everywhere] for room in floor]
    levels[everywhere:] = [[room for floor in levels[everywhere:] for room in floor]]
    boxes: dict[str, tuple[float, float, float, float]] = {}
    top = 0.0
    for floor in levels:
        inside = {room: files(room) for room in floor}
        height = LINE * (2 + max(map(len, inside.values())))
        width = min(WIDTH / len(floor) - 0.12, 3.4)
        gap = (WIDTH - width * len(floor)) / (len(floor) + 1)
        for i, room in enumerate(floor):
            boxes[room] = (gap + i * (width + gap), top - height, width, height)
        top -= height + 0.4
    figure, axes = plt.subplots(figsize=(WIDTH, -top))
    for one, other in sorted(arrows(drawn)):
        (x, y, w, _), (to_x, to_y, to_w, to_h) = boxes[one], boxes[other]
        start, end = (x + w / 2, y), (to_x + to_w / 2, to_y + to_h)
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#8a94a3", "lw": 0.9}, zorder=0)
    for room, (x, y, w, h) in boxes.items():
        lines = files(room)
        shape = FancyBboxPatch((x, y), w, h, "round,pad=0,rounding_size=0.08", fc=COLOURS[not lines], ec="#5b6b82")
        axes.add_patch(shape)
        name = f"{room}/" if lines else f"{room}.py"
        axes.text(
            x + w / 2,
            y + h - 0.19,
            name,
            ha="center",
            va="center",
            size=10 if w > 1.5 else 8,
            weight="bold",
            color="#1f2a3a",
        )
        for number, line in enumerate(lines):
            axes.text(x + w / 2, y + h - LINE * (number + 2), line, ha="center", va="center", size=7, color="#38475c")
    axes.set(xlim=(0, WIDTH), ylim=(top + 0.3, 0.05))
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw(DOCS / "rooms.svg")
