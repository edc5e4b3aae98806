"""What a model costs, whatever the machine: parameters, multiply-adds, activations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tokenfusion.errors import InputError, first_line
from tokenfusion.models.create import create_model, default_config, list_models

Size = tuple[int, int]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, those that stay as they are included."""
    return sum(parameter.numel() for parameter in model.parameters())


class CountProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what convolutions and matrix products cost while it is open.

    Attributes:
        macs: multiply-adds, by operation.
        activations: elements of their outputs.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: Counter[Any] = Counter()
        self.activations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        operation = func.overloadpacket
        if operation in flop_registry:
            self.macs[operation] += flop_registry[operation](*args, **kwargs, out_val=output) // 2
            self.activations += output.numel()
        return output


@dataclass(frozen=True)
class Counts:
    """What one image costs, whatever the machine.

    Attributes:
        parameters: all, those of frozen parents included.
        macs: multiply-adds of convolutions and matrix products, attention's q kᵀ and map·v included.
        attention_macs: those of q kᵀ and map·v alone.
        activations: elements of the outputs of convolutions and matrix products, as timm and fvcore count them; an
            attention map counts even where a fused kernel never stores it.
    """

    parameters: int
    macs: int
    attention_macs: int
    activations: int


def count_costs(model: nn.Module, images: Tensor) -> Counts:
    """Count what a forward pass costs; cheapest with both on the meta device, where nothing is computed."""
    with CountProducts() as count, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.eval()(images)
    attention = count.macs[torch.ops.aten.bmm]  # the one product of two activations; weights go through the others
    return Counts(count_parameters(model), count.macs.total(), attention, count.activations)


def input_size(model: nn.Module) -> Size:
    """Height and width of the images that a built model is made for."""
    height, width = default_config(model)["input_size"][1:]
    return height, width


def native_size(name: str) -> Size:
    """The same of a model by name."""
    with torch.device("meta"):
        return input_size(create_model(name))


@lru_cache(maxsize=64)  # a run writes its description more than once
def count_model(
    name: str, *, num_classes: int | None = None, in_chans: int = 3, img_size: Size | None = None
) -> tuple[Counts, Size]:
    """What an image costs a model, and the image's height and width.

    The model is built on the meta device, where nothing is computed, so that this is cheap for any size.

    Args:
        name, num_classes, in_chans: as in `create_model`.
        img_size: height and width in pixels; the model's own when not given.

    Raises:
        InputError: there is no such model, or it cannot take such images.
    """
    with torch.device("meta"):
        try:
            model = create_model(name, num_classes=num_classes, in_chans=in_chans, img_size=img_size)
            height, width = img_size or input_size(model)
            return count_costs(model, torch.empty(1, in_chans, height, width)), (height, width)
        except (AssertionError, RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            own = native_size(name)
            height, width = img_size or own
            reason = first_line(error)
            size = f"try its own size, {own[0]}×{own[1]}"
            remedy = "give another number of channels" if own == (height, width) else size
            raise InputError(
                f"{name} cannot take {in_chans}-channel images of {height}×{width} pixels: {reason}; {remedy}"
            ) from error


def count_macs(name: str, *, num_classes: int | None = None, in_chans: int = 3, img_size: Size | None = None) -> int:
    """Multiply-adds of matrix products and convolutions, attention's included; arguments as in `count_model`."""
    return count_model(name, num_classes=num_classes, in_chans=in_chans, img_size=img_size)[0].macs


def describe_models(pattern: str = "*") -> list[dict[str, Any]]:
    """Name, parameters, multiply-adds and input size of every model of this package that matches a shell pattern."""
    rows = []
    for name in list_models(pattern):
        counts, size = count_model(name)
        rows.append({"name": name, "parameters": counts.parameters, "macs": counts.macs, "img_size": list(size)})
    return rows
