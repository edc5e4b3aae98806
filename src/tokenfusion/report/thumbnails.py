"""Small pictures of a run's images, for its report."""

import json
from pathlib import Path

from torch import Tensor
from torchvision.io import encode_png
from torchvision.transforms.v2 import functional as F

from tokenfusion.data.decode import UnreadableImage
from tokenfusion.data.open import open_dataset
from tokenfusion.errors import InputError
from tokenfusion.recipe import Recipe, load_recipe
from tokenfusion.report.page import Thumbnails

SIDE = 160
"""Longest side of a picture in pixels."""


def shrink(image: Tensor, side: int) -> Tensor:
    """An image (3, H, W) made so small that no side is longer than `side`, and none shorter than a pixel."""
    height, width = image.shape[1:]
    scale = side / max(height, width, side)
    return F.resize(image, [max(round(height * scale), 1), max(round(width * scale), 1)], antialias=True)


def thumbnails_of(run: Path) -> Thumbnails:
    """Of the images that a run was evaluated on."""

    def thumbnails(names: list[str]) -> dict[str, bytes]:
        data = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["data"]
        max_pixels = Recipe(**load_recipe(run / "recipe.toml")).max_pixels
        try:
            source = open_dataset(data)
        except InputError:  # moved away since: the report says so in place of each picture
            return {}
        places = {name: index for index, name in enumerate(source.names)}
        pictures = {}
        for name in names:
            try:
                image = source.decode(places[name], max_pixels)
            except (KeyError, UnreadableImage):
                continue
            pictures[name] = bytes(encode_png(shrink(image, SIDE).contiguous()).numpy())
        return pictures

    return thumbnails
