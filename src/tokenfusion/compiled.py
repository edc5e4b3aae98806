"""Models compiled by Inductor, PyTorch's compiler (`--compile`): called in a model's place, which stays as it is, so
that names, weights, their average and checkpoints are those of a run that is not compiled."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tokenfusion.classifier import Classifier
from tokenfusion.errors import InputError, first_line

BACKEND: Any = "inductor"
DRAWS: dict[str, Any] = {"fallback_random": True}
"""Dropout and stochastic depth draw as they do uncompiled."""


def compiled(called: Any) -> Any:
    """A module or function whose first call compiles it, and so does every call of another shape."""
    return torch.compile(called, backend=BACKEND, dynamic=False, options=DRAWS)


def require_compiler(device: torch.device) -> None:
    """Refuse where nothing can be compiled, before any work is done: a sum of two numbers is tried.

    Raises:
        InputError: it cannot, and why.
    """
    try:
        compiled(lambda numbers: numbers + 1)(torch.zeros(2, device=device))
    except Exception as error:  # whatever compilers and drivers have to say
        reason, triton = first_line(error), ", and Triton" * (device.type == "cuda")
        raise InputError(
            f"--compile: a sum of two numbers cannot be compiled ({reason}); install a C++ compiler such as g++, with "
            f"Python's headers{triton}, or leave out --compile (a run that was begun with it must go on with it)"
        ) from error


def compiled_classifier(classifier: Classifier, batch_size: int) -> Classifier:
    """A classifier whose model is compiled for inference, in batches of one size.

    Args:
        classifier: its model is called as it is elsewhere, uncompiled.
        batch_size: images in the model at once, the most that it will be given.
    """
    return replace(classifier, model=OneSize(classifier.model.eval(), batch_size))


class OneSize(nn.Module):
    """A compiled model that always sees batches of one size, so that nothing is compiled twice: shorter ones are filled
    up with blank images.

    Args:
        model: infers, an image at a time whatever stands beside it.
        batch_size: the size.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size
        self.whole, self.features = compiled(model), compiled(model.forward_features)

    def forward(self, images: Tensor) -> Tensor:
        return self.filled_up(self.whole, images)

    def forward_features(self, images: Tensor) -> Any:
        return self.filled_up(self.features, images)

    def forward_head(self, features: Any, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(features, pre_logits=pre_logits)  # type: ignore[operator]

    def filled_up(self, called: Callable[[Tensor], Any], images: Tensor) -> Any:
        """What is said of the images (B, in_chans, H, W), and not of the blank ones behind them."""
        count = len(images)
        assert count <= self.batch_size
        batch = F.pad(images, (0,) * 7 + (self.batch_size - count,)).contiguous(memory_format=torch.channels_last)
        return tree_map(lambda output: output[:count], called(batch))
