"""What a model costs, whatever the machine: parameters, multiply-adds, activations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tokenfusion.models import create_model, default_config, list_models


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


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
        parameters: trainable ones.
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
        return count_costs(model, image).macs


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
