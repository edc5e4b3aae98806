"""Where a batch becomes a gradient, and a gradient moves the weights."""

from math import inf
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tokenfusion.data.loader import Batch
from tokenfusion.errors import InputError
from tokenfusion.hardware import autocast
from tokenfusion.recipe import Recipe
from tokenfusion.training.distributed.ddp import gradients_exchanged
from tokenfusion.training.distributed.fsdp import whole
from tokenfusion.training.distributed.world import Requests
from tokenfusion.training.objective import with_sides
from tokenfusion.training.optimizer import seed_step
from tokenfusion.training.recovery import (
    BadStep,
    OutOfMemory,
    moving_weights,
    out_of_memory_named,
    require_finite_step,
    undo,
    use_smaller_parts,
)
from tokenfusion.training.saved import last_good
from tokenfusion.training.schedule import learning_rate, side_weight
from tokenfusion.training.setup import Setup
from tokenfusion.training.state import TrainState


def take_step(setup: Setup, state: TrainState, batch: Batch, requests: Requests) -> tuple[float, int]:
    """A step, in smaller parts where the batch does not fit into memory.

    Returns:
        The mean loss before the step, and how many predictions are right.

    Raises:
        InputError: the loss or the gradient is not finite, memory does not suffice for one image or ran out while the
            weights moved, or BatchNorm has a single value per channel.
    """
    buffers = [buffer.clone() for buffer in state.model.buffers()]
    while True:
        try:
            loss, correct = train_step(setup, state, batch, requests)
            with moving_weights(state, setup.run):
                state.update_average()
            return loss, correct
        except BadStep as error:
            raise InputError(in_words(error, setup, state)) from None
        except OutOfMemory as error:
            shortage = str(error)
        undo(state, buffers)
        parts = state.progress.accumulate or setup.recipe.accumulate
        setup.run.say(use_smaller_parts(shortage, parts, len(batch[0]), state))


def in_words(error: BadStep, setup: Setup, state: TrainState) -> str:
    """What is wrong with a step, which one it is, with which images, and what to do about it."""
    progress = state.progress
    names = setup.batches.names_in(progress.epoch, progress.step_in_epoch)
    images = ", ".join(names[:3]) + f" and {len(names) - 3:,} more" * (len(names) > 3)
    where = f"step {progress.step + 1} (epoch {progress.epoch + 1}, batch {progress.step_in_epoch + 1}: {images})"
    remedy = "train anew with a lower --lr or --precision fp32 and another --out"
    return f"{error} at {where}; {last_good(setup.run.checkpoint)} {remedy}"


@out_of_memory_named()
def train_step(setup: Setup, state: TrainState, batch: Batch, requests: Requests) -> tuple[float, int]:
    """One optimiser step. On a GPU it waits once, for the numbers that decide whether the weights may move.

    Args:
        setup, state: what is trained.
        batch: prepared pixels, uint8 (B, in_chans, h, w); labels (B,), or (B, num_classes) of multi-label data; and
            where images count differently, weights (B,) of their losses.
        requests: agreed on by all processes.

    Returns:
        The mean loss before the step, and how many predictions are right.

    Raises:
        OutOfMemory: the batch does not fit; gradients and buffers are to be put back, weights are as they were.
        BadStep: the loss or the gradient is not finite; the same.
        InputError: memory ran out while the weights moved, or BatchNorm has a single value per channel.
    """
    recipe, model, progress, batches = setup.recipe, state.model, state.progress, setup.batches
    seed_step(recipe.seed, progress.step)
    learn(model, recipe)
    images, *others = batch
    mixed = setup.mixing(
        setup.classifier.to_input(images), *(some.to(setup.classifier.device, non_blocking=True) for some in others)
    )
    inputs, targets = map(batches.share.drop_before, mixed)
    if state.world.size > 1:
        seed_step(recipe.seed, progress.step, state.world.rank)
    loss, correct = compute_gradients(setup, state, inputs, targets)
    norm = whole(nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad or inf))
    mean_loss, right, gradient_norm = state.world.agree(loss, correct, norm, requests)
    require_finite_step(mean_loss, gradient_norm)
    rate = learning_rate(recipe, progress.step, batches.steps_per_epoch, progress.decay_epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    with moving_weights(state, setup.run):
        state.optimizer.step()
    state.optimizer.zero_grad()
    return mean_loss, right


def learn(model: nn.Module, recipe: Recipe) -> None:
    """Bring a model into the mode of training, but for BatchNorm's statistics where the recipe fixes them."""
    model.train()
    if recipe.fix_batchnorm:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def compute_gradients(setup: Setup, state: TrainState, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward, a part of the batch at a time; several processes' gradients are averaged with the last.

    Returns:
        The mean loss of this process's images, without those of single sides, and how many of its predictions are
        right: 0-dimensional, on the device.

    Raises:
        InputError: BatchNorm has a single value per channel.
    """
    recipe, progress = setup.recipe, state.progress
    parts = progress.accumulate or recipe.accumulate
    weight = side_weight(recipe, progress.step, setup.batches.steps_per_epoch, progress.decay_epoch)
    loss_sum = torch.zeros((), dtype=torch.float64, device=inputs.device)
    correct = torch.zeros((), dtype=torch.int64, device=inputs.device)
    pairs = list(zip(inputs.chunk(parts), targets.chunk(parts), strict=True))
    for number, (part, part_targets) in enumerate(pairs, 1):
        with gradients_exchanged(state.network, number == len(pairs)):
            with autocast(setup.classifier.device, recipe.precision):
                given = logits_of(state.network, part)
            logits, *alone = given if recipe.side_loss else (given,)
            loss = setup.loss(logits, part_targets) / len(inputs)
            losses_alone = [setup.loss(one, part_targets) / len(inputs) for one in alone]
            with_sides(loss, losses_alone, weight).backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.detach()
        correct += setup.loss.count_right(logits, part_targets)
    return loss_sum, correct


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's output (B, num_classes), or of each side too (3, B, num_classes), in float32 while it trains.

    Raises:
        InputError: BatchNorm has a single value per channel, of which there is no variance.
    """
    try:
        return cast(Tensor, model(images).float())
    except ValueError as error:
        if "Expected more than 1" not in str(error):
            raise
        raise InputError(
            f"BatchNorm sees a single value per channel in {len(images)} image at a time; "
            "train with a larger --batch-size, a smaller --accumulate or a larger --img-size, and another --out"
        ) from error
