"""Small pictures of a run's images, for its report."""

import json
from collections.abc import Callable
from pathlib import Path

from torchvision.io import encode_png
from torchvision.transforms.v2 import functional as F

from tokenfusion.data.decode import UnreadableImage
from tokenfusion.data.sources import open_source
from tokenfusion.errors import InputError
from tokenfusion.recipe import Recipe, load_recipe

SIDE = 160
"""Longest side of a picture in pixels."""


def thumbnails_of(run: Path) -> Callable[[list[str]], dict[str, bytes]]:
    """A function from names of images that a run was evaluated on to their PNG files, without the unreadable."""

    def thumbnails(names: list[str]) -> dict[str, bytes]:
        data = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["data"]
        max_pixels = Recipe(**load_recipe(run / "recipe.toml")).max_pixels
        try:
            source = open_source(data)
        except InputError:  # moved away since: the report says so in place of each picture
            return {}
        places = {name: index for index, name in enumerate(source.names)}
        pictures = {}
        for name in names:
            try:
                image = source.decode(places[name], max_pixels)
            except (KeyError, UnreadableImage):
                continue
            if max(image.shape[1:]) > SIDE:
                image = F.resize(image, None, max_size=SIDE, antialias=True)
            pictures[name] = bytes(encode_png(image.contiguous()).numpy())
        return pictures

    return thumbnails
