"""What leaves the run folder: from uint8 pixels to calibrated probabilities, in one module that exports."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from tokenfusion.classifier import Classifier
from tokenfusion.errors import InputError


class Deployable(nn.Module):
    """p = softmax(model((x / 255 - μ) / σ) / T); of multi-label models a sigmoid takes the softmax's place.

    Resizing and cropping stay outside: engines do not antialias as the run does.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        preprocess = classifier.preprocess
        self.model = plain_attention(deepcopy(classifier.model).cpu().float().eval())
        self.multi_label, self.temperature = classifier.multi_label, classifier.temperature
        self.register_buffer("mean", 255 * torch.tensor(preprocess.mean).view(-1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(preprocess.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Prepared images uint8 (B, in_chans, h, w) to probabilities float32 (B, K)."""
        logits = self.model((images.float() - self.mean) / self.std) / self.temperature
        return logits.sigmoid() if self.multi_label else logits.softmax(1)


def plain_attention(model: nn.Module) -> nn.Module:
    """The model with attention as two products and a softmax wherever it has a choice: not every fused kernel, such as
    CMT's with its bias, has a counterpart in ONNX, and engines fuse the products again."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010 - not every Module has it
    return model


def trace(classifier: Classifier, batch: int | None) -> torch.export.ExportedProgram:
    """The classifier as a program of tensors, which every format starts from.

    Args:
        classifier: what to export.
        batch: images of a call; None for any number.

    Raises:
        InputError: the model cannot be traced, or only for a fixed number of images.
    """
    preprocess = classifier.preprocess
    grey = torch.full((batch or 2, preprocess.in_chans, *preprocess.img_size), 128, dtype=torch.uint8)
    shapes: Any = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    with quiet():
        try:
            return torch.export.export(Deployable(classifier).eval(), (grey,), dynamic_shapes=shapes)
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{classifier.name} cannot be exported: {reason}; try --batch 1") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters print and log on their way."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
