"""Intermediate features in timm's form, observed from outside the model's forward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tokenfusion.layers.tokens import grid_of, map_to_tokens, size_of, tokens_to_map


@dataclass(frozen=True)
class FeaturePoint:
    """A module whose output is an intermediate feature.

    Attributes:
        module: its dotted name.
        num_chs: channels of its output.
        reduction: pixels of the image per pixel of the feature, along one side.
        prefix_tokens: tokens before the patch tokens; None where the output is already a map (B, C, h, w).
    """

    module: str
    num_chs: int
    reduction: int
    prefix_tokens: int | None = None

    def as_feature_info(self) -> dict[str, Any]:
        """The form that timm's `feature_info` takes."""
        return {"num_chs": self.num_chs, "reduction": self.reduction, "module": self.module}


def collect_intermediates(
    model: nn.Module,
    points: Sequence[FeaturePoint],
    images: Tensor,
    *,
    indices: int | Sequence[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: nn.Module | None = None,
    output_fmt: str = "NCHW",
) -> tuple[Tensor, list[Any]]:
    """Run `model.forward_features` and gather the outputs of chosen points.

    Args:
        model: a model with `forward_features`.
        points: everything that can be gathered, in order.
        images: (B, in_chans, H, W).
        indices: which points: the last n, a list, or all.
        return_prefix_tokens: give (feature, prefix tokens) pairs.
        norm: applied to token outputs.
        output_fmt: "NCHW" or "NLC".

    Returns:
        The final tokens, and the features in the order of `points`.

    Raises:
        ValueError: unknown `output_fmt`.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt={output_fmt!r} is not known; choose NCHW or NLC")
    take, _ = feature_take_indices(len(points), indices)
    outputs: dict[int, Tensor] = {}
    handles = [
        model.get_submodule(points[i].module).register_forward_hook(
            lambda _module, _inputs, output, i=i: outputs.__setitem__(i, output)
        )
        for i in take
    ]
    try:
        final = model.forward_features(images)  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()

    def shaped(point: FeaturePoint, output: Tensor) -> Any:
        if point.prefix_tokens is None:
            prefix, feature_map = output.new_zeros(len(output), 0, point.num_chs), output
        else:
            grid = grid_of(size_of(images), point.reduction)
            tokens = norm(output) if norm else output
            first, last = point.prefix_tokens, point.prefix_tokens + grid[0] * grid[1]
            prefix, feature_map = tokens[:, :first], tokens_to_map(tokens[:, first:last], grid)
        feature = feature_map if output_fmt == "NCHW" else map_to_tokens(feature_map)
        return (feature, prefix) if return_prefix_tokens else feature

    return final, [shaped(points[i], outputs[i]) for i in sorted(take)]
