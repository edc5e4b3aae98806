"""Pictures for reports: a run's images made small, and what `tokenfusion explain` drew over its worst mistakes."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor
from torchvision.io import encode_png
from torchvision.transforms.v2 import functional as F

from tokenfusion.data.dataset import printable
from tokenfusion.data.decode import UnreadableImage, decode_ahead
from tokenfusion.errors import InputError
from tokenfusion.json_files import AGAIN, read_json
from tokenfusion.judged import open_judged
from tokenfusion.recipe import Recipe, load_recipe
from tokenfusion.report.page import Thumbnails
from tokenfusion.report.run_folder import require_fields

SIDE = 160
"""Longest side of a picture in pixels."""


def thumbnails_of(run: Path) -> Thumbnails:
    """Of the images that a run was evaluated on."""

    def thumbnails(names: list[str]) -> dict[str, bytes]:
        try:
            found = list(decode_named(run, names))
        except InputError:  # moved away since: the report says so in place of each picture
            return {}
        return {name: png_of(shrink(image, SIDE)) for name, image in found if isinstance(image, Tensor)}

    return thumbnails


def decode_named(run: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor | UnreadableImage]]:
    """Images that a run was evaluated on by their names, in order, uint8 (3, H, W); or why one cannot be had any more.

    Raises:
        InputError: the data cannot be opened.
    """
    recipe = Recipe(**load_recipe(run / "recipe.toml"))
    data = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["data"]
    dataset, _, _ = open_judged(run, recipe, data)
    indices = {name: index for index, name in enumerate(dataset.names)}

    def decode(name: str) -> Tensor:
        if printable(name) not in indices:
            raise UnreadableImage(f"{data} does not have it any more")
        return dataset.decode(indices[printable(name)], recipe.max_pixels)

    return decode_ahead(names, decode)


def shrink(image: Tensor, side: int) -> Tensor:
    """An image (3, H, W) made so small that no side is longer than `side`, and none shorter than a pixel."""
    height, width = image.shape[1:]
    scale = side / max(height, width, side)
    return F.resize(image, [max(round(height * scale), 1), max(round(width * scale), 1)], antialias=True)


def png_of(image: Tensor) -> bytes:
    """An image, uint8 (1 or 3, H, W), as a PNG file."""
    return encode_png(image.contiguous()).numpy().tobytes()


def overlays_of(run: Path) -> dict[tuple[str, str], list[tuple[str, bytes]]]:
    """What RUN/explain/mistakes holds, by an image's name and the class explained: captions and PNG files.

    Nothing where there is no such folder. Names are as `printable` spells them.

    Raises:
        InputError: its explain.json is damaged.
    """
    path = run / "explain" / "mistakes" / "explain.json"
    if not path.is_file():
        return {}
    found = read_json(path, AGAIN)
    require_fields(found, {"method": str, "images": list}, path)
    overlays: dict[tuple[str, str], list[tuple[str, bytes]]] = {}
    for image in found["images"]:
        require_fields(image, {"path": str}, path)
        if "error" in image:
            continue
        require_fields(image, {"overlays": list}, path)
        for drawn in image["overlays"]:
            require_fields(drawn, dict.fromkeys(("branch", "class", "file"), str), path)
            picture = path.with_name(Path(drawn["file"]).name)
            if picture.is_file():
                caption = f"{found['method']}, {drawn['branch'].replace('_', ' ')}"
                overlays.setdefault((image["path"], drawn["class"]), []).append((caption, picture.read_bytes()))
    return overlays
