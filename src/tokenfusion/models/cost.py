"""What a model costs: parameters and multiply-adds."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenfusion.models import create_model, default_config, list_models


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_macs(
    name: str, *, num_classes: int | None = None, in_chans: int = 3, img_size: tuple[int, int] | None = None
) -> int:
    """Multiply-adds of matrix products and convolutions, attention's included, for one image.

    The model is built without memory for its weights, so that this is cheap for any size.

    Args:
        name, num_classes, in_chans: as in `create_model`.
        img_size: height and width in pixels; the variant's own when not given.
    """
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes, in_chans=in_chans, img_size=img_size)
        height, width = img_size or default_config(model)["input_size"][1:]
        image = torch.empty(1, in_chans, height, width)
        with FlopCounterMode(display=False) as counter:
            model.eval().requires_grad_(False)(image)
    return counter.get_total_flops() // 2


def describe_models(pattern: str = "*") -> list[dict[str, Any]]:
    """Name, parameters, multiply-adds and input size of every model of this package that matches a shell pattern."""
    rows = []
    for name in list_models(pattern):
        with torch.device("meta"):
            model = create_model(name)
        img_size = list(default_config(model)["input_size"][1:])
        rows.append(
            {"name": name, "parameters": count_parameters(model), "macs": count_macs(name), "img_size": img_size}
        )
    return rows
