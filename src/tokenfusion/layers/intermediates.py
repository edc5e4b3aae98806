"""Intermediate features in timm's form, observed from outside the model's forward."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from tokenfusion.layers.tokens import grid_of, tokens_to_map


@dataclass(frozen=True)
class FeaturePoint:
    """A module whose output is an intermediate feature.

    Attributes:
        module: its dotted name; the last part is its place in a row of layers.
        num_chs: channels of the feature.
        reduction: pixels of the image per place of the feature, along one side.
        prefix_tokens: tokens before the patch tokens; None where the output is already a map (B, C, h, w).
        norm: dotted name of the norm that such tokens pass at the model's end; None where there is none.
        output: which of the module's outputs, where it gives several.
    """

    module: str
    num_chs: int
    reduction: int | Fraction
    prefix_tokens: int | None = None
    norm: str | None = None
    output: int | None = None

    def as_feature_info(self) -> dict[str, Any]:
        """The form that timm's `feature_info` takes."""
        return {"num_chs": self.num_chs, "reduction": round(self.reduction), "module": self.module}

    def inside(self, module: str) -> "FeaturePoint":
        """The same point of a model that stands inside another as `module`."""
        return replace(self, module=f"{module}.{self.module}", norm=self.norm and f"{module}.{self.norm}")

    def split(self, output: Tensor, img_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """An output for images of `img_size` as a map (B, C, h, w), and the tokens (B, K, C) before it."""
        if self.prefix_tokens is None:
            return output, output.new_zeros(len(output), 0, self.num_chs)
        grid = grid_of(img_size, self.reduction)
        prefix, patches = output[:, : self.prefix_tokens], output[:, self.prefix_tokens :]
        return tokens_to_map(patches[:, : grid[0] * grid[1]], grid), prefix


class EverythingGathered(Exception):  # noqa: N818 - not an error
    """Ends a forward pass that has given all that it is run for."""


@torch.compiler.disable
def runs_in(thread: int) -> bool:
    """Whether this is that thread; Dynamo cannot trace the question."""
    return get_ident() == thread


def gather_outputs(
    model: nn.Module, points: Sequence[FeaturePoint], images: Tensor, *, stop_early: bool = False
) -> tuple[Any, list[Tensor]]:
    """Run `model.forward_features` and gather the outputs at some points.

    Args:
        model: a model with `forward_features`.
        points: where to gather.
        images: (B, in_chans, H, W).
        stop_early: end the pass as soon as every point has given its output.

    Returns:
        What `forward_features` gives, None where it was stopped; and the outputs, in the order of `points`.
    """
    outputs: dict[FeaturePoint, Tensor] = {}
    thread = None if torch.compiler.is_compiling() else get_ident()

    def gather(point: FeaturePoint, output: Any) -> None:
        if thread is not None and not runs_in(thread):  # another pass through the same modules
            return
        outputs[point] = output if point.output is None else output[point.output]
        if stop_early and len(outputs) == len(points):
            raise EverythingGathered

    final = None
    with suppress(EverythingGathered), ExitStack() as hooks:
        for point in points:
            hook = model.get_submodule(point.module).register_forward_hook(
                lambda _module, _inputs, output, point=point: gather(point, output)
            )
            hooks.enter_context(hook)
        final = model.forward_features(images)  # type: ignore[operator]
    return final, [outputs[point] for point in points]
