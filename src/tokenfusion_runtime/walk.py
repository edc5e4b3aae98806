"""The one way to walk a folder, for train, check, evaluate and predict: what is an image there, and what is not."""

import os
from pathlib import Path

from tokenfusion_runtime.image import is_image

DROPPINGS = frozenset(
    {"__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle", "found.000"}
    | {"recycler"}
    | {"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r", "__pycache__", "thumbnails", "_thumbnails", "@tmp"}
)
"""Names, in small letters, of what macOS, Windows, Linux, NAS boxes, notebooks and viewers leave behind; those that
begin with a dot, such as .ipynb_checkpoints, .DS_Store and ._photo.jpg, are hidden anyway."""
HIDDEN = "hidden"
DROPPING = "left by a system or a tool"
NO_IMAGE = "no image by its name"


def why_ignored(file: str) -> str:
    """Why a file, by its path relative to the data, is no image of it; "" where its name is no reason."""
    parts = file.split("/")
    if any(part.casefold() in DROPPINGS for part in parts):
        return DROPPING
    if any(part.startswith(".") for part in parts):
        return HIDDEN
    return "" if is_image(file) else NO_IMAGE


def walk(root: Path) -> tuple[list[str], list[str]]:
    """All files and folders below `root`, as sorted paths relative to it.

    Links are followed, but never into a folder that leads to where the walk is: such a link would not end.

    Raises:
        OSError: a folder cannot be read.
    """
    files: list[str] = []
    folders: list[str] = []

    def visit(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            if not is_folder(entry):
                files.append(prefix + entry.name)
            elif (here := identity(entry.path)) not in above:
                folders.append(prefix + entry.name)
                visit(entry.path, f"{prefix}{entry.name}/", above | {here})

    visit(str(root), "", frozenset(identity(folder) for folder in (root.resolve(), *root.resolve().parents)))
    return files, folders


def images_below(folder: str) -> list[str]:
    """The paths of the image files below a folder, in order, without those that training ignores by their names."""
    files, _ = walk(Path(folder))
    return sorted(os.path.join(folder, file) for file in files if not why_ignored(file))


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself is no folder; as an image it will be found unreadable
        return False


def identity(folder: str | Path) -> tuple[int, int]:
    """What two paths to the same folder have in common."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino
