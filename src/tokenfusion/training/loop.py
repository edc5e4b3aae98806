"""The training loop, readable top to bottom."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from types import FrameType

from torch import nn

from tokenfusion.data.decoded import Images
from tokenfusion.data.loader import Batch
from tokenfusion.evaluate import collect_logits
from tokenfusion.hardware import peak_memory_mb
from tokenfusion.training.distributed.world import Requests
from tokenfusion.training.log import Log
from tokenfusion.training.progress import Listener, Update
from tokenfusion.training.recovery import saved_when_data_fails
from tokenfusion.training.schedule import decide_end, epochs_ahead, learning_rate
from tokenfusion.training.setup import Setup
from tokenfusion.training.state import Record, TrainState
from tokenfusion.training.step import take_step


class Interrupted(Exception):  # noqa: N818 - no error
    """Training was stopped by a signal after its state was saved."""


def fit(setup: Setup, state: TrainState, tell: Listener, log: Log | None) -> None:
    """Train until the recipe's last epoch, or until patience ends; every epoch ends in a checkpoint.

    Started from a state that was saved at any step, it ends bit-equal to a run that was never interrupted.

    Raises:
        InputError: the loss is not finite; the last checkpoint is kept.
        Interrupted: Ctrl-C; the state is saved first.
    """
    recipe, progress, checkpoint, requests = setup.recipe, state.progress, setup.run.checkpoint, Requests()
    saved = clock = perf_counter()
    with stop_on_signals(requests, together=state.world.size > 1):
        while not progress.finished:
            for batch in rest_of_epoch(setup, state):
                requests.save = perf_counter() - saved > recipe.save_minutes * 60
                loss, correct = take_step(setup, state, batch, requests)
                clock, elapsed = perf_counter(), perf_counter() - clock
                progress.add_step(loss, correct, setup.batches.batch_size, elapsed)
                tell(update(setup, state))
                stopped = state.world.stops(requests)
                if stopped or requests.agreed_save:
                    state.save(checkpoint)
                    saved = clock = perf_counter()  # writing is no training
                if stopped:
                    raise Interrupted

            shipped = state.gather_shipped()
            with saved_when_data_fails(state, setup.run):
                val_loss, val_score = validate(setup, state, shipped)
                if state.best is not None and state.average and state.judges_both:
                    # an average that is slower than patience would be judged before it has learned anything
                    own_loss, own_score = validate(setup, state, state.model)
                    if own_score > val_score:
                        shipped, val_loss, val_score = state.model, own_loss, own_score
            record = epoch_record(setup, state, shipped, val_loss, val_score)
            done = update(setup, state)
            progress.end_epoch(record)
            state.remember_best(val_score, shipped)
            decided = decide_end(recipe, progress)
            state.save(checkpoint)
            saved = clock = perf_counter()
            if log:
                log.write(progress.records)
            tell(replace(done, record=record, seconds_left=epochs_ahead(recipe, progress) * record["seconds"]))
            setup.run.say(decided)
            if state.world.stops(requests) and not progress.finished:
                raise Interrupted


def end_at_start(setup: Setup, state: TrainState, log: Log, seconds: float) -> None:
    """A run that ends as it began, which took so many seconds: its only record is what training and held-out images
    say of it."""
    progress = state.progress
    if not progress.finished:
        shipped = state.gather_shipped()
        progress.loss_sum, score = validate(setup, state, shipped, setup.batches.images)
        progress.seen, progress.seconds = 1, seconds
        record = epoch_record(setup, state, shipped, *validate(setup, state, shipped))
        rate = len(setup.batches.images) / progress.seconds
        known = {"epoch": 0, "lr": 0.0, f"train_{setup.loss.train_score}": score, "images_per_s": rate}
        progress.end_epoch(record | known)
        progress.finished = True
        state.save(setup.run.checkpoint)
        log.write(progress.records)


def rest_of_epoch(setup: Setup, state: TrainState) -> Iterator[Batch]:
    """The batches that are left of the epoch under way; if its data fails, all that is done is saved."""
    with saved_when_data_fails(state, setup.run):
        yield from setup.batches.epoch(state.progress.epoch, start=state.progress.step_in_epoch)


def validate(setup: Setup, state: TrainState, shipped: nn.Module, images: Images | None = None) -> tuple[float, float]:
    """Loss and score (accuracy or mAP) of the shipped weights on the held-out images, or on others."""
    images = setup.held_out if images is None else images
    count, world = len(images), state.world
    size = -(-count // world.size)  # of a share; the last ones are filled up with the last image
    share = [min(index, count - 1) for index in range(world.rank * size, (world.rank + 1) * size)]
    classifier = replace(setup.classifier, model=shipped)
    logits, _ = collect_logits(classifier, images, workers=setup.recipe.workers, indices=share)
    return setup.loss.judge(world.gather(logits)[:count], images.labels)


def epoch_record(setup: Setup, state: TrainState, shipped: nn.Module, val_loss: float, val_score: float) -> Record:
    """The line of `metrics.jsonl` for the epoch that just ended."""
    progress = state.progress
    return {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        "lr": learning_rate(setup.recipe, progress.step - 1, setup.batches.steps_per_epoch, progress.decay_epoch),
        "train_loss": progress.train_loss,
        f"train_{setup.loss.train_score}": progress.train_top1,
        "val_loss": val_loss,
        f"val_{setup.loss.score}": val_score,
        "seconds": progress.seconds,
        "images_per_s": progress.rate,
        "peak_memory_mb": peak_memory_mb(setup.classifier.device),
        "accumulate": progress.accumulate or setup.recipe.accumulate,
        "out_of_memory": progress.out_of_memory,
        **(setup.watch.see(shipped, progress.epoch + 1) if setup.watch else {}),
    }


def update(setup: Setup, state: TrainState) -> Update:
    """Where training stands after the step that was just taken."""
    progress = state.progress
    epochs = progress.epoch + epochs_ahead(setup.recipe, progress)
    return Update(
        step=progress.step,
        steps=epochs * setup.batches.steps_per_epoch,
        epoch=progress.epoch + 1,
        epochs=epochs,
        loss=progress.train_loss,
        score=progress.train_top1,
        images_per_s=progress.rate,
    )


@contextmanager
def stop_on_signals(requests: Requests, together: bool) -> Iterator[None]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a request to stop after the step under way; one that comes a second
    later, or after that, stops at once.

    Where several processes train together they stop together, as each hears of it from the others as well. In another
    thread than the main one, which alone hears of signals, nothing changes.
    """

    asked = 0.0

    def request(_signal: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if requests.stop and not together and perf_counter() - asked > 1:  # quicker, it is the same wish
            raise KeyboardInterrupt
        if not requests.stop:
            asked = perf_counter()
        requests.stop = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
