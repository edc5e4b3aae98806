"""What a person or a program is told while a model trains."""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenfusion.training.state import Record

WORDS = {"top1": "accuracy", "exact_match": "exact match", "map": "mAP"}
"""Scores as people call them, by their names in `metrics.jsonl`."""


@dataclass(frozen=True, repr=False)
class Update:
    """Where training stands, after a step or after an epoch.

    Attributes:
        step: optimiser steps done.
        steps: of the whole run, at most.
        epoch: the one under way or just done, from 1.
        epochs: of the whole run, at most.
        loss: mean over the images of the epoch so far.
        score: share of them that was right (accuracy; of multi-label data, those with all classes right).
        images_per_s: training images a second in this epoch.
        record: after an epoch its line of `metrics.jsonl`, held-out loss and score included; None after a step.
        seconds_left: after an epoch, until the last one, at most; 0 after a step.
        stage: of a run that is trained in stages, the one that these are numbers of.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    score: float
    images_per_s: float
    record: Record | None = None
    seconds_left: float = 0.0
    stage: str = ""

    def __repr__(self) -> str:
        stage = f"{self.stage}, " * bool(self.stage)
        done = ", the epoch is done" * (self.record is not None)
        return (
            f"<Update: {stage}epoch {self.epoch}/{self.epochs}, step {self.step}/{self.steps}, "
            f"loss {self.loss:.4g}, score {self.score:.2%}{done}>"
        )


Listener = Callable[[Update], object]
"""Told of every step and every epoch, in the thread that trains; what it raises ends the training."""


class Display:
    """A live bar over all the steps of a run in a terminal, and a line for every epoch done: a `Listener`.

    Args:
        console: where to write.
        score: what `metrics.jsonl` calls the running score of training.
    """

    def __init__(self, console: Console, score: str = "top1") -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn(
                f"{{task.fields[rate]:,.0f}} images/s · loss {{task.fields[loss]:.3f}} · {WORDS[score]} "
                "{task.fields[score]:.1%} ·"
            ),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            speed_estimate_period=120,
        )
        self.task = self.bar.add_task("train", total=None, epoch=0, epochs=0, rate=0.0, loss=0.0, score=0.0)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, update: Update) -> None:
        if update.record is not None:
            self.console.print(epoch_line(update, update.record), highlight=False, soft_wrap=True)
            return
        fields: dict[str, Any] = {"epoch": update.epoch, "epochs": update.epochs, "rate": update.images_per_s}
        fields |= {"loss": update.loss, "score": update.score}
        self.bar.update(self.task, completed=update.step, total=update.steps, **fields)


def epoch_line(update: Update, record: Record) -> str:
    """What is printed of an epoch done."""
    minutes, seconds = divmod(round(update.seconds_left), 60)
    stage = f"{update.stage}, " * bool(update.stage)
    return (
        f"{stage}epoch {record['epoch']}/{update.epochs}  "
        f"train loss {record['train_loss']:.3f} {scores(record, 'train_')}  "
        f"held-out loss {record['val_loss']:.3f} {scores(record, 'val_')}  "
        f"{record['images_per_s']:,.0f} images/s  {minutes}:{seconds:02d} left"
    )


def scores(record: Record, part: str) -> str:
    """The scores of a part of the images, such as `accuracy 91.20%`, by the beginning of their keys."""
    found = {word: record[part + name] for name, word in WORDS.items() if part + name in record}
    return " ".join(f"{word} {value:.2%}" for word, value in found.items())
