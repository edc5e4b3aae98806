"""Gradient checkpointing that computes exactly what it would have computed without."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """A module that calls its parts through `run`, which may recompute them in the backward pass."""

    grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each part in the backward pass instead of keeping them."""
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.grad_checkpointing = enable

    def run(self, part: nn.Module, *args: Any) -> Any:
        """Call a part, checkpointed if so set."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpointed(part, *args)
        return part(*args)


class FrozenRunningStatistics(AbstractContextManager[None]):
    """Every BatchNorm inside keeps its running statistics as they are, while still using the batch's.

    It may be entered again, as a second backward pass through the same graph does.
    """

    def __init__(self, module: nn.Module) -> None:
        norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
        self.norms = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.track_running_stats]

    def __enter__(self) -> None:
        self.counts = [None if counter is None else counter.clone() for _, _, counter in self.norms]
        for norm, *_ in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *_error: object) -> None:
        for (norm, momentum, counter), count in zip(self.norms, self.counts, strict=True):
            norm.momentum = momentum
            if counter is not None and count is not None:
                counter.copy_(count)


def checkpointed(module: nn.Module, *args: Any) -> Any:
    """`module(*args)`, its activations recomputed in the backward pass instead of kept.

    The second pass would update BatchNorm's running statistics a second time; here it leaves them alone.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), FrozenRunningStatistics(module) if module.training else nullcontext()

    return checkpoint(module, *args, use_reentrant=False, context_fn=contexts)
