"""What a model loses when tokens of one source are replaced by their mean, from outside.

The mean is over images and places, so that neither what a token shows nor where it stands is left of it. CLS and other
tokens without a place stay.

Letters: B batch, T tokens, C channels, N images, K classes.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.analyze.record import evaluating
from tokenfusion.analyze.token_spans import TokenSpan, all_spans, token_spans
from tokenfusion.formatting import Progress, unheard
from tokenfusion.intervals import mean_interval, tango_interval
from tokenfusion.layers.tokens import size_of
from tokenfusion.models.fused_model import FusedModel
from tokenfusion.models.operators import Operator

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images (B, in_chans, H, W) as the model takes them, and their labels (B,); to be gone through several times."""
WHOLE = "whole branch"
"""What the rows are called that are of no single layer."""


@torch.no_grad()
def measure_ablation(model: nn.Module, batches: Batches, progress: Progress = unheard) -> dict[str, Any]:
    """Accuracy and loss when the tokens of a source are replaced by their mean, in one layer or in all.

    Where: `token_spans`. In a block's input the tokens' stream ends there. An operator's tokens are those that it
    reads: patches pass it by as far as its gate is closed, and the CNN's map goes on as it was, through its own
    residual, and may bring the pixels back in the next exchange; what an addition adds becomes the mean update.

    Args:
        model: a fusion, or a transformer that can be walked; run in evaluation mode, and left as it was.
        batches: images of one size, and labels.
        progress: told of the replacements.

    Returns:
        `images`, how many; `top1` and `loss` as it is; `replaced`: for each `layer` and `tokens`, and for each source's
        "whole branch" (see `whole_branch`), `top1` and `loss`, and how much they change against the model as it is,
        with 95 % intervals paired over images; at a late fusion's operators CLS has read the patches already, and keeps
        that. `compared`: of each two sources, `tokens`, by how much the loss without the whole branch of the first is
        above that without the second's, `loss_difference`, paired as well.

    Raises:
        InputError: the model has no row of blocks over its patches.
    """
    size = size_of(next(iter(batches))[0])
    spans = token_spans(model, size)
    labels = torch.cat([labels for _, labels in batches]).cpu()
    groups = [(span.module, span.source, [span]) for span in spans]
    groups += [(WHOLE, source, whole_branch(model, size, source)) for source in dict.fromkeys(s.source for s in spans)]
    with evaluating(model):
        means, logits = token_means(model, dict.fromkeys(span for _, _, chosen in groups for span in chosen), batches)
        right, loss = scores(logits, labels)
        rows, losses = [], {}
        for layer, source, chosen in groups:
            with replaced(model, {span: means[span] for span in chosen}):
                new_right, new_loss = scores(all_logits(model, batches), labels)
            row = {"layer": layer, "tokens": source, "top1": float(new_right.mean()), "loss": float(new_loss.mean())}
            row |= {"top1_change": tango_interval(new_right - right), "loss_change": mean_interval(new_loss - loss)}
            rows.append(row)
            if layer == WHOLE:
                losses[source] = new_loss
            progress("replacing tokens", len(rows), len(groups))
    compared = [
        {"tokens": [one, other], "loss_difference": mean_interval(losses[one] - losses[other])}
        for one, other in combinations(losses, 2)
    ]
    known = {"images": len(labels), "top1": float(right.mean()), "loss": float(loss.mean())}
    return known | {"replaced": rows, "compared": compared}


def whole_branch(model: nn.Module, size: tuple[int, int], source: str) -> list[TokenSpan]:
    """Where to replace the tokens of a source so that nothing of them is left, in images (H, W): in all layers.

    Patches that pixels are exchanged with carry those as well from then on, and a gate leads past the operators: they
    are replaced where they enter (`FusedModel.entrance`), but where the blocks themselves carry both kinds.
    """
    mine = [span for span in token_spans(model, size) if span.source == source]
    if source == "pixel" or not isinstance(model, FusedModel) or model.joint:
        return mine
    return [span for span in all_spans(dict([model.entrance(size)])) if span.source == source]


@contextmanager
def replaced(model: nn.Module, means: Mapping[TokenSpan, Tensor]) -> Iterator[None]:
    """Tokens replaced by a vector (C,) each while the context lasts; the model is as before afterwards.

    An operator gives updates of the tokens that pass it by: what replaces a token is put into its update too, so that
    nothing of the token is left behind an open gate.
    """
    with ExitStack() as stack:
        for span, mean in means.items():
            for handle in replace_in(model, span, mean):
                stack.callback(handle.remove)
        yield


def replace_in(model: nn.Module, span: TokenSpan, mean: Tensor) -> Iterator[Any]:
    """Hook a module so that it meets a vector in the place of some tokens; gives the hooks' handles."""
    module, changes = model.get_submodule(span.module), list[Tensor]()

    def replace(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = inputs[span.argument].clone()
        tokens[:, span.start : span.stop] = mean.to(tokens)
        changes[:] = [tokens - inputs[span.argument]]
        return (*inputs[: span.argument], tokens, *inputs[span.argument + 1 :])

    def update(_module: nn.Module, _inputs: Any, updates: tuple[Tensor, Tensor | None]) -> tuple[Tensor | None, ...]:
        change, known = changes.pop(), updates[span.argument]
        changed = change if known is None else known + change
        return (changed, updates[1]) if span.argument == 0 else (updates[0], changed)

    def enter(_module: nn.Module, _inputs: Any, update: Tensor) -> Tensor:
        return update + changes.pop()

    yield module.register_forward_pre_hook(replace)
    if isinstance(module, Operator):
        yield module.register_forward_hook(update)
    elif isinstance(model, FusedModel):  # a strategy adds a gated update to the tokens as they were before: X + a dX
        for gate, before in model.gates().items():
            if before == span.module:
                yield model.get_submodule(gate).register_forward_hook(enter)


def token_means(
    model: nn.Module, spans: Iterable[TokenSpan], batches: Batches
) -> tuple[dict[TokenSpan, Tensor], Tensor]:
    """The mean token (C,) of each span over images and places, and the model's logits (N, K)."""
    totals: dict[TokenSpan, Tensor] = {}

    def add(span: TokenSpan, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        total = inputs[span.argument][:, span.start : span.stop].double().mean(1).sum(0)
        totals[span] = totals.get(span, 0) + total

    with ExitStack() as stack:
        for span in spans:
            hook = model.get_submodule(span.module).register_forward_pre_hook(partial(add, span))
            stack.callback(hook.remove)
        logits = all_logits(model, batches)
    return {span: total / len(logits) for span, total in totals.items()}, logits


def all_logits(model: nn.Module, batches: Batches) -> Tensor:
    """Logits (N, K) of all images, in float32 on the CPU."""
    return torch.cat([model(images).float().cpu() for images, _ in batches])


def scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image, whether it is right (1 or 0) and its cross-entropy, (N,) each."""
    logits = logits.double()
    return (logits.argmax(1) == labels).double(), F.cross_entropy(logits, labels, reduction="none")
