"""The training loop, readable top to bottom."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from tokenfusion.classifier import Classifier
from tokenfusion.data.images import Images
from tokenfusion.data.loader import TrainLoader
from tokenfusion.errors import InputError
from tokenfusion.evaluate import collect_logits
from tokenfusion.hardware import autocast, peak_memory_mb
from tokenfusion.recipe import Recipe
from tokenfusion.train.display import Display
from tokenfusion.train.log import Log
from tokenfusion.train.mixing import BatchMixing
from tokenfusion.train.optimizer import learning_rate, seed_step
from tokenfusion.train.state import Record, TrainState, last_good

CHECKPOINT = Path("state", "last.safetensors")
"""Where a run folder keeps all that it needs to go on."""


@dataclass(frozen=True)
class Job:
    """What a run trains, on what, and where it writes."""

    recipe: Recipe
    classifier: Classifier
    loader: TrainLoader
    mixing: BatchMixing
    held_out: Images
    run: Path

    @property
    def checkpoint(self) -> Path:
        return self.run / CHECKPOINT


class Interrupted(Exception):  # noqa: N818 - no error
    """Training was stopped by a signal after its state was saved."""


def fit(job: Job, state: TrainState, display: Display, log: Log) -> None:
    """Train until the recipe's last epoch, or until patience ends; every epoch ends in a checkpoint.

    Started from a state that was saved at any step, it ends bit-equal to a run that was never interrupted.

    Raises:
        InputError: the loss is not finite; the last checkpoint is kept.
        Interrupted: Ctrl-C; the state is saved first.
    """
    recipe, progress, loader = job.recipe, state.progress, job.loader
    saved, clock = perf_counter(), perf_counter()
    with stop_request() as stop:
        while not progress.finished:
            for images, labels in loader.epoch(progress.epoch, start=progress.step_in_epoch):
                loss, correct = train_step(job, state, images, labels)
                state.update_average()
                clock, elapsed = perf_counter(), perf_counter() - clock
                progress.add_step(loss, correct, len(labels), elapsed)
                display.show_step(
                    progress.epoch, progress.step, progress.rate, progress.train_loss, progress.train_top1
                )
                if stop or clock - saved > recipe.save_minutes * 60:
                    state.save(job.checkpoint)
                    saved = perf_counter()
                if stop:
                    raise Interrupted

            val_loss, val_top1 = validate(job, state)
            record = epoch_record(job, state, val_loss, val_top1)
            progress.end_epoch(record)
            state.remember_best(val_top1)
            waited = progress.epoch - progress.best_epoch
            progress.finished = progress.epoch == recipe.epochs or 0 < recipe.patience <= waited
            state.save(job.checkpoint)
            saved = clock = perf_counter()
            log.write(progress.records)
            display.show_epoch(record, seconds_left=(recipe.epochs - progress.epoch) * record["seconds"])
            if stop and not progress.finished:
                raise Interrupted


def train_step(job: Job, state: TrainState, images: Tensor, labels: Tensor) -> tuple[float, int]:
    """One optimiser step.

    Args:
        job, state: what is trained.
        images: prepared pixels, uint8 (B, in_chans, h, w).
        labels: (B,).

    Returns:
        The mean loss before the step, and how many predictions match the label that weighs most.
    """
    recipe, model, progress = job.recipe, state.model, state.progress
    device = job.classifier.device
    seed_step(recipe.seed, progress.step)
    model.train()
    inputs, targets = job.mixing(job.classifier.to_input(images), labels.to(device))
    loss_sum, correct = 0.0, 0
    for part, part_targets in zip(inputs.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True):
        with autocast(device, recipe.precision):
            logits = logits_of(model, part)
        loss = F.cross_entropy(logits, part_targets, label_smoothing=recipe.label_smoothing, reduction="sum") / len(
            inputs
        )
        loss.backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.item()
        correct += int((logits.argmax(1) == part_targets.argmax(1)).sum())
    if not isfinite(loss_sum):
        raise InputError(
            f"the loss is {loss_sum} at step {progress.step + 1} "
            f"(epoch {progress.epoch + 1}, batch {progress.step_in_epoch + 1}); {last_good(job.checkpoint)} "
            "train anew with a lower --lr or --precision fp32"
        )
    if recipe.clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
    rate = learning_rate(recipe, progress.step, job.loader.steps_per_epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    state.optimizer.step()
    state.optimizer.zero_grad()
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
    """Loss and accuracy of the shipped weights on the held-out images."""
    logits, labels = collect_logits(
        replace(job.classifier, model=state.shipped), job.held_out, workers=job.recipe.workers
    )
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def epoch_record(job: Job, state: TrainState, val_loss: float, val_top1: float) -> Record:
    """The line of `metrics.jsonl` for the epoch that just ended."""
    progress = state.progress
    return {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "lr": learning_rate(job.recipe, progress.step - 1, job.loader.steps_per_epoch),
        "train_loss": progress.train_loss,
        "train_top1": progress.train_top1,
        "val_loss": val_loss,
        "val_top1": val_top1,
        "seconds": progress.seconds,
        "images_per_s": progress.rate,
        "peak_memory_mb": peak_memory_mb(job.classifier.device),
    }


class StopRequest:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C into a request that is met after the step under way; a second one stops at once."""
    stop = StopRequest()

    def ask(_signal: int, _frame: FrameType | None) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
