"""Gradient checkpointing that computes exactly what it would have computed without."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Let every BatchNorm inside keep its running statistics as they are, while still using the batch's."""
    before = [
        (norm, norm.momentum, norm.num_batches_tracked, norm.num_batches_tracked.clone())
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and norm.num_batches_tracked is not None
    ]
    for norm, *_ in before:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, counter, count in before:
            norm.momentum = momentum
            counter.copy_(count)


def checkpointed(module: nn.Module, *args: Any) -> Any:
    """`module(*args)`, its activations recomputed in the backward pass instead of kept.

    The second pass would update BatchNorm's running statistics a second time; here it leaves them alone.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), frozen_running_statistics(module) if module.training else nullcontext()

    return checkpoint(module, *args, use_reentrant=False, context_fn=contexts)
