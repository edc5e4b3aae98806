"""Where a model looks: a map over the image for each branch, by gradients or by attention.

Letters: B batch, T tokens, C channels, H heads, h w grid.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.analyze.record import AttentionRecord, attention_layouts, evaluating, record_attention
from tokenfusion.analyze.rollout import attention_rollout, require_followed
from tokenfusion.analyze.token_spans import TokenSpan, block_spans
from tokenfusion.analyze.tokens import attending, attention_by_token
from tokenfusion.errors import InputError
from tokenfusion.layers.tokens import size_of, tokens_to_map
from tokenfusion.models.base import PaperModel, choose
from tokenfusion.models.fused_model import FusedModel

Maps = dict[str, Tensor]
"""A map (B, h, w) a branch."""
BRANCH_OF = {
    "pixel": "cnn",
    "patch": "transformer",
    "small_patch": "transformer_small",
    "large_patch": "transformer_large",
}
"""The branch that tokens of a source stand for; CrossViT has two of the transformer."""


class Point(NamedTuple):
    """Where a branch's features are read.

    Attributes:
        module: dotted name.
        argument: which of its arguments holds them; None for its output.
        span: the tokens meant; None for a map (B, C, h, w).
        channels: how many C are expected of a module's output.
    """

    module: str
    argument: int | None = None
    span: TokenSpan | None = None
    channels: int | None = None


def cnn_point(model: FusedModel) -> Point:
    """The last map of a fusion's CNN."""
    return Point(f"cnn.stages.{len(model.cnn.stages) - 1}", channels=model.cnn.dims[-1])


def feature_points(model: Any, size: tuple[int, int]) -> dict[str, Point]:
    """Where Grad-CAM reads each branch: a CNN's last map, and the patch tokens that a transformer's last block reads.

    Behind the last block a patch that the head does not read has no gradient.

    Raises:
        InputError: the model names no features.
    """
    points = {"cnn": cnn_point(model)} if isinstance(model, FusedModel) else {}
    with suppress(InputError):
        last = {span.source: span for span in block_spans(model, size) if span.source != "pixel"}
        return points | {BRANCH_OF[source]: Point(span.module, span.argument, span) for source, span in last.items()}
    if not getattr(model, "feature_info", None):
        raise InputError(f"a {type(model).__name__} names no feature maps, so that Grad-CAM has nothing to look at")
    with_attention = isinstance(model, PaperModel) and model.attention_layouts()
    feature = model.feature_info[-1]
    return {"transformer" if with_attention else "cnn": Point(feature["module"], channels=feature["num_chs"])}


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor) -> Maps:
    """Grad-CAM (Selvaraju et al., arXiv 1610.02391): ReLU of the features' sum, weighed by their mean gradients.

    Args:
        model: gives logits; a part of it must be a CNN, or a transformer that can be walked.
        images: (B, in_chans, H, W) as the model takes them.
        classes: (B,) whose logits are explained.

    Raises:
        InputError: there are no such features.
    """
    points = feature_points(model, size_of(images))
    seen: dict[str, Tensor] = {}

    def see_argument(branch: str, argument: int, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[branch] = inputs[argument]

    def see_output(branch: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen[branch] = output

    with torch.enable_grad(), evaluating(model), ExitStack() as stack:
        for branch, point in points.items():
            module = model.get_submodule(point.module)
            if point.argument is None:
                handle = module.register_forward_hook(partial(see_output, branch))
            else:
                handle = module.register_forward_pre_hook(partial(see_argument, branch, point.argument))
            stack.callback(handle.remove)
        logits = model(images.detach().requires_grad_())  # of frozen weights too
        chosen = logits.gather(1, classes.to(logits.device)[:, None]).sum()
        gradients = torch.autograd.grad(chosen, [seen[branch] for branch in points])
    return {
        branch: weighed(as_map(seen[branch], point), as_map(gradient, point))
        for (branch, point), gradient in zip(points.items(), gradients, strict=True)
    }


def as_map(features: Tensor, point: Point) -> Tensor:
    """Tokens (B, T, C), or a map as it is, as (B, C, h, w).

    Raises:
        InputError: they are neither.
    """
    if point.span is not None:
        return tokens_to_map(features[:, point.span.start : point.span.stop], point.span.grid)
    if features.ndim != 4 or point.channels not in (None, features.shape[1]):
        raise InputError(
            f"Grad-CAM cannot read {point.module}: it gives {tuple(features.shape)}, not a map (B, C, h, w); "
            "take a CNN, or a transformer whose blocks follow each other, such as a ViT"
        )
    return features


def weighed(features: Tensor, gradient: Tensor) -> Tensor:
    """ReLU(Σ_c mean(gradient_c) · features_c): (B, C, h, w) twice to (B, h, w)."""
    weights = gradient.mean((2, 3), keepdim=True)
    return F.relu((weights * features).sum(1)).detach().float().cpu()


def rollout_maps(model: nn.Module, images: Tensor, classes: Tensor) -> Maps:  # noqa: ARG001 - of every class the same
    """Attention rollout: how much of what the head reads comes from each place, whatever the class."""
    maps = attention_rollout(model, images).maps()
    return {BRANCH_OF[source]: found for source, found in maps.items() if source in BRANCH_OF}


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, classes: Tensor) -> Maps:  # noqa: ARG001 - of every class the same
    """What CLS attends to, mean over heads, in the last layer in which it attends to a branch's tokens."""
    size, maps = size_of(images), Maps()
    attends = attending(attention_layouts(model, size))

    def see(record: AttentionRecord) -> None:
        grids = {group.source: group.grid for group in record.layout.keys}
        for source, given in attention_by_token(record.map, record.layout, attends).items():
            grid = grids[source]
            if grid and source in BRANCH_OF:
                maps[BRANCH_OF[source]] = given.reshape(-1, *grid)

    with evaluating(model), record_attention(model, reduce=see):
        model(images)
    return maps


METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor], Maps]] = {
    "gradcam": grad_cam,
    "rollout": rollout_maps,
    "attention": attention_maps,
}
REFUSALS: dict[str, Callable[[nn.Module, tuple[int, int]], object]] = {
    "gradcam": feature_points,
    "rollout": require_followed,
    "attention": attention_layouts,
}
"""What raises where a method cannot read a model for images (H, W), before any is looked at."""


def require_readable(model: nn.Module, size: tuple[int, int], method: str) -> None:
    """Refuse a method that cannot read a model, by an InputError with the reason, before any image is looked at."""
    choose(REFUSALS, method, "method")(model, size)


def saliency(model: nn.Module, images: Tensor, classes: Tensor, method: str = "gradcam", branch: str = "both") -> Maps:
    """Where a model looks when it says a class.

    Args:
        model: a model of this package, or one of timm's.
        images: (B, in_chans, H, W) as the model takes them.
        classes: (B,) outputs to explain; attention and rollout are the same for all.
        method: "gradcam", "rollout" or "attention".
        branch: "cnn", "transformer", or "both" for all that there are.

    Returns:
        maps (B, h, w), none below 0, by branch: "cnn", "transformer"; CrossViT's are "transformer_small" and
        "transformer_large".

    Raises:
        InputError: the method cannot read the model, says nothing of this branch, or gives what is not finite.
    """
    maps = choose(METHODS, method, "method")(model, images, classes)
    wanted = {name: found for name, found in maps.items() if branch == "both" or name.startswith(branch)}
    if not wanted:
        reason = f"a {type(model).__name__} has no {branch}"
        if isinstance(model, FusedModel):
            reason = f"no attention of this {type(model).__name__} reads its tokens, which are added"
        raise InputError(f"--branch {branch} cannot be shown: {reason}; take --branch both")
    for name, found in wanted.items():
        if not found.isfinite().all():
            raise InputError(
                f"the map of {name} is not finite: weights or activations of this {type(model).__name__} are not; "
                "take another run, or train with a smaller lr"
            )
    return wanted
