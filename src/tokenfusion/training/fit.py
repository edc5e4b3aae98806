"""The training loop, readable top to bottom."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import cast

from torch import Tensor, nn

from tokenfusion.classifier import Classifier
from tokenfusion.data.decoded import Images
from tokenfusion.data.loader import Batch, TrainLoader
from tokenfusion.errors import InputError
from tokenfusion.evaluate import collect_logits
from tokenfusion.hardware import autocast, peak_memory_mb
from tokenfusion.recipe import Recipe
from tokenfusion.training.display import Display
from tokenfusion.training.distributed import Wishes, gradients_exchanged
from tokenfusion.training.ending import decide_end, epochs_ahead
from tokenfusion.training.faults import (
    BadStep,
    Before,
    OutOfMemory,
    compute_in_smaller_parts,
    moving_weights,
    out_of_memory_named,
    pass_over,
    require_good,
    saved_when_data_fails,
)
from tokenfusion.training.log import Log
from tokenfusion.training.losses import BinaryCrossEntropy, CrossEntropy, Loss
from tokenfusion.training.mixing import BatchMixing
from tokenfusion.training.optimizer import learning_rate, seed_step
from tokenfusion.training.sharded import whole
from tokenfusion.training.state import Record, TrainState
from tokenfusion.training.watch import Watch

CHECKPOINT = Path("state", "last.safetensors")
"""Where a run folder keeps all that it needs to go on."""


@dataclass(frozen=True)
class Job:
    """What a run trains, on what, with whom, and where it writes."""

    recipe: Recipe
    classifier: Classifier
    loader: TrainLoader
    mixing: BatchMixing
    held_out: Images
    run: Path
    wishes: Wishes = field(default_factory=Wishes)
    watch: Watch | None = None
    positive_weights: Tensor | None = None
    """Of `BinaryCrossEntropy`."""

    @cached_property
    def loss(self) -> Loss:
        """What is minimised: it depends on whether an image has one class or any number of them."""
        smoothing = self.recipe.label_smoothing
        if self.classifier.multi_label:
            return BinaryCrossEntropy(smoothing, self.positive_weights)
        return CrossEntropy(smoothing)

    @property
    def checkpoint(self) -> Path:
        return self.run / CHECKPOINT

    @property
    def epoch_start(self) -> Path:
        """Where the state at the start of an epoch is kept, if the recipe may roll back to it."""
        return self.checkpoint.with_name("epoch.safetensors")


class Interrupted(Exception):  # noqa: N818 - no error
    """Training was stopped by a signal after its state was saved."""


def fit(job: Job, state: TrainState, display: Display, log: Log | None) -> None:
    """Train until the recipe's last epoch, or until patience ends; every epoch ends in a checkpoint.

    Started from a state that was saved at any step, it ends bit-equal to a run that was never interrupted.

    Raises:
        InputError: the loss is not finite; the last checkpoint is kept.
        Interrupted: Ctrl-C; the state is saved first.
    """
    recipe, progress = job.recipe, state.progress
    saved, clock = perf_counter(), perf_counter()
    with stop_on_signals(job.wishes, together=state.world.size > 1):
        while not progress.finished:
            if recipe.on_bad_loss == "rollback" and progress.step_in_epoch == 0:
                state.save(job.epoch_start)
            for batch in batches(job, state):
                job.wishes.save = perf_counter() - saved > recipe.save_minutes * 60
                loss, correct, images = careful_step(job, state, display, batch)
                clock, elapsed = perf_counter(), perf_counter() - clock
                progress.add_step(loss, correct, images, elapsed)
                display.show_step(
                    progress.epoch, progress.step, progress.rate, progress.train_loss, progress.train_top1
                )
                stopped = state.world.stops(job.wishes)
                if stopped or job.wishes.agreed_save:
                    state.save(job.checkpoint)
                    saved = perf_counter()
                if stopped:
                    raise Interrupted

            with saved_when_data_fails(state, job.checkpoint, job.run):
                val_loss, val_score = validate(job, state)
            record = epoch_record(job, state, val_loss, val_score)
            progress.end_epoch(record)
            state.remember_best(val_score)
            decided = decide_end(recipe, progress)
            state.save(job.checkpoint)
            saved = clock = perf_counter()
            if log:
                log.write(progress.records)
            display.show_epoch(record, seconds_left=epochs_ahead(recipe, progress) * record["seconds"])
            display.say(decided)
            if state.world.stops(job.wishes) and not progress.finished:
                raise Interrupted


def batches(job: Job, state: TrainState) -> Iterator[Batch]:
    """What is left of the epoch under way; if its data fails, all that is done is saved."""
    with saved_when_data_fails(state, job.checkpoint, job.run):
        yield from job.loader.epoch(state.progress.epoch, start=state.progress.step_in_epoch)


def careful_step(job: Job, state: TrainState, display: Display, batch: Batch) -> tuple[float, int, int]:
    """A step; with a batch that does not fit into memory in smaller parts, with a bad loss as the recipe says.

    Returns:
        The mean loss before the step, how many predictions are right, and of how many images; all 0 if no weight moved.

    Raises:
        InputError: it could not be taken, and the recipe does not put up with that.
    """
    recipe, progress, before = job.recipe, state.progress, Before.step(state)
    while True:
        try:
            loss, correct = train_step(job, state, *batch)
            with moving_weights(state, job.checkpoint, job.run):
                state.update_average()
            return loss, correct, job.loader.batch_size
        except OutOfMemory as error:
            shortage, fault = str(error), ""
        except BadStep as error:
            fault = str(error)
        before.restore(state)
        if fault:
            display.say(pass_over(fault, recipe, state, job.checkpoint, job.epoch_start))
            return 0.0, 0, 0
        parts = progress.accumulate or recipe.accumulate
        display.say(compute_in_smaller_parts(shortage, parts, len(batch[0]), state))


@out_of_memory_named()
def train_step(
    job: Job, state: TrainState, images: Tensor, labels: Tensor, weights: Tensor | None = None
) -> tuple[float, int]:
    """One optimiser step.

    Args:
        job, state: what is trained.
        images: prepared pixels, uint8 (B, in_chans, h, w).
        labels: (B,), or (B, num_classes) of multi-label data.
        weights: (B,), how much each image's loss counts; all the same when not given.

    Returns:
        The mean loss before the step, and how many predictions are right.

    Raises:
        OutOfMemory: the batch does not fit; gradients and buffers are to be put back, weights are as they were.
        BadStep: the loss or the gradient must not move the weights; the same.
        InputError: memory ran out while the weights moved.
    """
    recipe, model, progress = job.recipe, state.model, state.progress
    device = job.classifier.device
    seed_step(recipe.seed, progress.step)
    model.train()
    weights = None if weights is None else weights.to(device)
    mixed = job.mixing(job.classifier.to_input(images), labels.to(device), weights)
    inputs, targets = map(job.loader.share.drop_before, mixed)
    if state.world.size > 1:
        seed_step(recipe.seed, progress.step, state.world.rank)
    loss, correct = state.world.agree(*compute_gradients(job, state, inputs, targets), job.wishes)
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad or inf)
    require_good(loss, whole(norm).item(), recipe, progress)
    rate = learning_rate(recipe, progress.step, job.loader.steps_per_epoch, progress.decay_epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    with moving_weights(state, job.checkpoint, job.run):
        state.optimizer.step()
    state.optimizer.zero_grad()
    return loss, correct


def compute_gradients(job: Job, state: TrainState, inputs: Tensor, targets: Tensor) -> tuple[float, int]:
    """Forward and backward, a part of the batch at a time; several processes' gradients are averaged with the last.

    Returns:
        The mean loss of this process's images, and how many of its predictions are right.
    """
    parts = state.progress.accumulate or job.recipe.accumulate
    loss_sum, correct = 0.0, 0
    pairs = list(zip(inputs.chunk(parts), targets.chunk(parts), strict=True))
    for number, (part, part_targets) in enumerate(pairs, 1):
        with gradients_exchanged(state.network, number == len(pairs)):
            with autocast(job.classifier.device, job.recipe.precision):
                logits = logits_of(state.network, part)
            loss = job.loss(logits, part_targets) / len(inputs)
            loss.backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.item()
        correct += job.loss.count_right(logits, part_targets)
    return loss_sum, correct


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's output (B, num_classes) in float32 while it trains.

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


def validate(job: Job, state: TrainState) -> tuple[float, float]:
    """Loss and score (accuracy or mAP) of the shipped weights on the held-out images."""
    count, world = len(job.held_out), state.world
    size = -(-count // world.size)  # of a share; the last ones are filled up with the last image
    share = [min(index, count - 1) for index in range(world.rank * size, (world.rank + 1) * size)]
    logits, _ = collect_logits(
        replace(job.classifier, model=state.shipped), job.held_out, workers=job.recipe.workers, indices=share
    )
    logits, labels = world.gather(logits)[:count], job.held_out.labels
    return job.loss.judge(logits, labels)


def epoch_record(job: Job, state: TrainState, val_loss: float, val_score: float) -> Record:
    """The line of `metrics.jsonl` for the epoch that just ended."""
    progress = state.progress
    return {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "lr": learning_rate(job.recipe, progress.step - 1, job.loader.steps_per_epoch, progress.decay_epoch),
        "train_loss": progress.train_loss,
        f"train_{job.loss.train_score}": progress.train_top1,
        "val_loss": val_loss,
        f"val_{job.loss.score}": val_score,
        "seconds": progress.seconds,
        "images_per_s": progress.rate,
        "peak_memory_mb": peak_memory_mb(job.classifier.device),
        "accumulate": progress.accumulate or job.recipe.accumulate,
        "out_of_memory": progress.out_of_memory,
        "skipped_steps": progress.skipped_steps,
        "rollbacks": progress.rollbacks,
        **(job.watch.see(state.shipped, progress.epoch + 1) if job.watch else {}),
    }


@contextmanager
def stop_on_signals(wishes: Wishes, together: bool) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into a wish to stop after the step under way; a second one stops at once.

    Where several processes train together they stop together, as each hears of it from the others as well.
    """

    def ask(_signal: int, _frame: FrameType | None) -> None:
        if wishes.stop and not together:
            raise KeyboardInterrupt
        wishes.stop = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
