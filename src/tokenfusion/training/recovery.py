"""What can go wrong in the middle of a run, and what is done about it: bad losses, memory that runs out, data."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite

import torch
from torch import Tensor

from tokenfusion.data.decoded import Images, Skipped, read_skipped, skipped_in, write_skipped
from tokenfusion.errors import InputError
from tokenfusion.hardware import is_out_of_memory
from tokenfusion.places import resume_command
from tokenfusion.recipe import Recipe
from tokenfusion.training.saved import last_good
from tokenfusion.training.setup import Run
from tokenfusion.training.state import TrainState


class BadStep(Exception):  # noqa: N818 - a range test takes it as an answer
    """A loss or a gradient that must not move the weights; the message says which."""


class OutOfMemory(Exception):  # noqa: N818 - as PyTorch calls it
    """What a step computes before it moves the weights did not fit into memory; the message is PyTorch's reason."""


def require_finite_step(loss: float, gradient: float) -> None:
    """Look at a step's mean loss and its gradient's norm before they move the weights.

    Raises:
        BadStep: one of them is not finite.
    """
    if not isfinite(loss):
        raise BadStep(f"the loss is {loss}")
    if not isfinite(gradient):
        raise BadStep(f"the gradient's norm is {gradient}")


def use_smaller_parts(reason: str, parts: int, images: int, state: TrainState) -> str:
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
def moving_weights(state: TrainState, run: Run) -> Iterator[None]:
    """End the run where memory runs out while weights, moments or the average change: the step cannot be taken again.

    Some have changed by then and others not; nobody keeps a copy of all of them.
    """
    try:
        with out_of_memory_named():
            yield
    except OutOfMemory as error:
        raise InputError(
            f"memory ran out ({error}) while step {state.progress.step + 1} changed the weights, of which some have "
            f"changed and others not; {last_good(run.checkpoint)} free memory and go on with "
            f"`{resume_command(run.folder)}`, or "
            "train a smaller model, or several processes with --parallel fsdp, and another --out"
        ) from error


def first_sentence(error: BaseException) -> str:
    """What an error says, without advice and addresses."""
    return re.sub(r"^\[.*?\][ .]*", "", str(error) or type(error).__name__).partition(". ")[0]


def undo(state: TrainState, buffers: list[Tensor]) -> None:
    """Make it as if a step had never begun, given the model's buffers before it, such as BatchNorm's statistics."""
    state.optimizer.zero_grad()
    for buffer, before in zip(state.model.buffers(), buffers, strict=True):
        buffer.copy_(before)


@contextmanager
def saved_when_data_fails(state: TrainState, run: Run) -> Iterator[None]:
    """Should an image have vanished or changed, or a loader process have died: save what is done, and say how to go on.

    Several processes cannot, as the others do not know; they go on from the last checkpoint.
    """
    try:
        yield
    except InputError as error:
        if state.world.size > 1:
            raise
        state.save(run.checkpoint)
        raise InputError(
            f"{error}; all is saved up to step {state.progress.step}: then go on with `{resume_command(run.folder)}`"
        ) from error


class Unreadable:
    """Notes unreadable training images in `skipped.csv`, each once, and refuses too many.

    A process but the first one writes `skipped-RANK.csv`, and all of them are counted. What is met again after a run
    was resumed is noted already, and refused again.

    Args:
        run: where they are noted, and where the first one is told.
        training: the images.
        recipe: how many of them are put up with.

    Raises:
        InputError: when called, of more images than the limit allows.
    """

    def __init__(self, run: Run, training: Images, recipe: Recipe) -> None:
        self.run, self.training, self.recipe = run, training, recipe
        rank = run.world.rank
        self.path = run.folder / (f"skipped-{rank}.csv" if rank else "skipped.csv")

    def __call__(self, unreadable: dict[int, str]) -> None:
        known = {image.path: image for image in skipped_in(self.run.folder)}
        new = []
        for index, reason in unreadable.items():
            if (name := self.training.names[index]) not in known:
                label = self.training.dataset.label_text(index)
                new.append(Skipped(name, label, "train", reason))
        found = [image for image in [*known.values(), *new] if image.split == "train"]
        if new:
            write_skipped(self.path, [*read_skipped(self.path), *new])
        if new and len(found) == len(new):
            self.run.say(
                f"{new[0].path} cannot be read: {new[0].reason}; the next image of its batch is drawn in its place. "
                f"All such images are listed in {self.path}"
            )
        if len(found) > self.recipe.may_skip(len(self.training)):
            raise InputError(
                f"{len(found)} of {len(self.training)} training images are unreadable so far, more than "
                f"max_skipped={self.recipe.max_skipped:g} allows (the last is {found[-1].path}: {found[-1].reason}); "
                "mend the shards, or start a new run with a larger --max-skipped, or without them by --exclude"
            )
