"""Gradients that are averaged over processes, each of which holds the whole model (DistributedDataParallel)."""

from contextlib import AbstractContextManager, nullcontext
from inspect import signature

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from tokenfusion.classifier import Classifier
from tokenfusion.hardware import autocast
from tokenfusion.training.distributed.world import World


def average_gradients(model: nn.Module, classifier: Classifier, world: World) -> nn.Module:
    """What the loop calls for a model whose gradients are averaged over the processes; for one, the model itself.

    Args:
        model: the classifier's, or what is called in its place.
        classifier: says what images it takes.
        world: the processes.
    """
    if world.size == 1:
        return model
    # BatchNorm's buffers are the same everywhere, as its statistics are of all processes; torch 2.14 renamed the option
    names = signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    network = DistributedDataParallel(model, static_graph=True, **{option: False})  # type: ignore[arg-type]
    rehearse(network, classifier)
    return network


def rehearse(network: nn.Module, classifier: Classifier) -> None:
    """Take a step on nothing, in which torch learns the order of gradients, and leave no trace of it.

    From the second step on it adds them up in this order; a resumed run would otherwise add its first ones in another.
    """
    buffers = [buffer.clone() for buffer in network.buffers()]
    blank = torch.zeros(2, classifier.preprocess.in_chans, *classifier.preprocess.img_size, device=classifier.device)
    for _ in range(2):
        with autocast(classifier.device, classifier.precision):
            output = network.train()(blank)
        output.float().sum().backward()
    for parameter in network.parameters():
        parameter.grad = None
    for buffer, before in zip(network.buffers(), buffers, strict=True):
        buffer.copy_(before)


def gradients_exchanged(network: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Within it, a backward pass averages gradients over the processes, or keeps them for a later one that does."""
    if isinstance(network, DistributedDataParallel) and not now:
        return network.no_sync()
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)
    return nullcontext()
