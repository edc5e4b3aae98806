"""What can go wrong in the middle of a run, and what is done about it: bad losses, memory that runs out, data."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from tokenfusion.checkpoint import resume_command
from tokenfusion.errors import InputError
from tokenfusion.hardware import is_out_of_memory
from tokenfusion.recipe import Recipe
from tokenfusion.training.sharded import last_good
from tokenfusion.training.state import Progress, TrainState

SPIKE = 3.0
"""A loss is a spike above so many times its running mean, and another nat more: the losses of a model that has learned
its data by heart are so small that their ratios say nothing."""
WINDOW = 32
"""Good steps that the running mean of the loss is over."""
FEWEST = 8
"""Good steps before which no loss is called a spike."""


class BadStep(Exception):  # noqa: N818 - may be what the recipe puts up with
    """A loss or a gradient that must not move the weights; the message says which."""


class OutOfMemory(Exception):  # noqa: N818 - as PyTorch calls it
    """What a step computes before it moves the weights did not fit into memory; the message is PyTorch's reason."""


def require_good(loss: float, gradient: float, recipe: Recipe, progress: Progress) -> None:
    """Look at a step before it moves the weights.

    Args:
        loss: mean over the batch, of all processes.
        gradient: its norm, of all processes.
        recipe: a spike counts where it says what to do about one.
        progress: remembers the losses before.

    Raises:
        BadStep: the loss or the gradient is not finite, or the loss is a spike.
    """
    if not isfinite(loss):
        raise BadStep(f"the loss is {loss}")
    if not isfinite(gradient):
        raise BadStep(f"the gradient's norm is {gradient}")
    recent = progress.recent_losses
    usual = sum(recent) / max(len(recent), 1)
    if recipe.on_bad_loss != "stop" and len(recent) >= FEWEST and loss > SPIKE * usual + 1:
        raise BadStep(f"the loss is {loss:.3g}, where {usual:.3g} is usual,")
    progress.recent_losses = [*recent, loss][-WINDOW:]


def pass_over(fault: str, recipe: Recipe, state: TrainState, last: Path, epoch_start: Path) -> str:
    """Do about a bad step what the recipe says; the weights are those before it.

    A roll back takes weights, average and optimiser from the start of the epoch, and goes on with the batches after the
    bad one: to come back to the same batch by the same steps would end the same (PaLM, arXiv 2204.02311, section 5.1).

    Args:
        fault: what is wrong, from `require_good`.
        recipe: gives `on_bad_loss` and `max_bad_steps`.
        state: to roll back.
        last: the last checkpoint, for the message.
        epoch_start: the state at the start of the epoch, where the recipe says rollback.

    Returns:
        What to tell the person who waits.

    Raises:
        InputError: the recipe says stop, or there were as many bad steps as it puts up with.
    """
    progress = state.progress
    where = f"{fault} at step {progress.step + 1} (epoch {progress.epoch + 1}, batch {progress.step_in_epoch + 1})"
    remedy = f"{last_good(last)} train anew with a lower --lr or --precision fp32"
    if recipe.on_bad_loss == "stop":
        raise InputError(f"{where}; {remedy}, or with --on-bad-loss skip or rollback")
    if progress.bad_steps == recipe.max_bad_steps:
        raise InputError(f"{where}, after {progress.bad_steps} bad steps, all that max_bad_steps allows; {remedy}")
    if recipe.on_bad_loss == "rollback":
        state.load(epoch_start)
        state.progress = progress  # what was done and seen stays so
        progress.rollbacks += 1
    else:
        progress.skipped_steps += 1
    progress.bad_steps += 1
    done = "back to the weights of the epoch's start" if recipe.on_bad_loss == "rollback" else "the batch is skipped"
    return f"{where}: {done} ({progress.bad_steps} of at most {recipe.max_bad_steps} bad steps)"


def compute_in_smaller_parts(reason: str, parts: int, images: int, state: TrainState) -> str:
    """Remember that batches are computed in twice as many parts from now on.

    Args:
        reason: PyTorch's.
        parts: that did not fit.
        images: in a batch, of this process.
        state: remembers it.

    Returns:
        What to tell the person who waits.

    Raises:
        InputError: a part is one image already; or there are several processes, of which the others wait in the middle
            of the step that this one cannot end.
    """
    if state.world.size > 1:
        raise InputError(
            f"memory ran out ({reason}) in process {state.world.rank} of {state.world.size}, which compute a step "
            f"together; train anew with --accumulate {2 * parts} and another --out"
        )
    if parts >= images:
        raise InputError(
            f"memory ran out ({reason}) with one image at a time; train a smaller model, or with a smaller --img-size "
            "or --grad-checkpointing, and another --out"
        )
    state.progress.accumulate = min(2 * parts, images)
    state.progress.out_of_memory += 1
    return (
        f"memory ran out ({reason}): from step {state.progress.step + 1} on, batches are computed in "
        f"{state.progress.accumulate} parts; they are as large as before, but BatchNorm sees a part at a time"
    )


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    """Turn the several errors of PyTorch that mean it into OutOfMemory.

    Raised anew, without its cause: the traceback would keep the tensors that filled the memory.
    """
    reason = ""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_sentence(error)
    if reason:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory(reason)


@contextmanager
def moving_weights(state: TrainState, checkpoint: Path, run: Path) -> Iterator[None]:
    """End the run where memory runs out while weights, moments or the average change: the step cannot be taken again.

    Some have changed by then and others not; nobody keeps a copy of all of them.
    """
    try:
        with out_of_memory_named():
            yield
    except OutOfMemory as error:
        raise InputError(
            f"memory ran out ({error}) while step {state.progress.step + 1} changed the weights, of which some have "
            f"changed and others not; {last_good(checkpoint)} free memory and go on with `{resume_command(run)}`, or "
            "train a smaller model, or several processes with --parallel fsdp, and another --out"
        ) from error


def first_sentence(error: BaseException) -> str:
    """What an error says, without advice and addresses."""
    return re.sub(r"^\[.*?\][ .]*", "", str(error) or type(error).__name__).partition(". ")[0]


@dataclass(frozen=True)
class Before:
    """The buffers of a model before a step, such as BatchNorm's statistics, which the forward pass changes."""

    buffers: list[Tensor]

    @classmethod
    def step(cls, state: TrainState) -> "Before":
        return cls([buffer.clone() for buffer in state.model.buffers()])

    def restore(self, state: TrainState) -> None:
        """Make it as if the step had never begun."""
        state.optimizer.zero_grad()
        for buffer, before in zip(state.model.buffers(), self.buffers, strict=True):
            buffer.copy_(before)


@contextmanager
def saved_when_data_fails(state: TrainState, checkpoint: Path, run: Path) -> Iterator[None]:
    """Should an image have vanished or changed, or a loader process have died: save what is done, and say how to go on.

    Several processes cannot, as the others do not know; they go on from the last checkpoint.
    """
    try:
        yield
    except InputError as error:
        if state.world.size > 1:
            raise
        state.save(checkpoint)
        raise InputError(
            f"{error}; all is saved up to step {state.progress.step}: then go on with `{resume_command(run)}`"
        ) from error
