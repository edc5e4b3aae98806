"""What one image costs a model by name, counted on the meta device, where nothing is computed."""

import torch

from tokenfusion.errors import InputError
from tokenfusion.models import create_model, default_config
from tokenfusion.models.cost import Counts, count_costs

Size = tuple[int, int]


def count_model(name: str, img_size: Size | None = None) -> tuple[Counts, Size]:
    """What an image costs a model, and the image's height and width.

    Args:
        name: as in `create_model`.
        img_size: height and width in pixels; the model's own when not given.

    Raises:
        InputError: there is no such model, or it cannot take images of that size.
    """
    with torch.device("meta"):
        own: Size = default_config(create_model(name))["input_size"][1:]
        height, width = img_size or own
        try:
            model = create_model(name, img_size=img_size)
            return count_costs(model, torch.empty(1, 3, height, width)), (height, width)
        except (AssertionError, RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            reason = str(error).partition("\n")[0].rstrip(".")
            raise InputError(
                f"{name} cannot take images of {height}×{width} pixels: {reason}; try its own size, {own[0]}×{own[1]}"
            ) from error
