"""What a person sees while a model trains: a live bar in a terminal, a line an epoch elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenfusion.training.state import Record

WORDS = {"top1": "accuracy", "exact_match": "exact match", "map": "mAP"}
"""Scores as people call them, by their names in `metrics.jsonl`."""


class Display:
    """A bar over all the steps of a run, and a line for every epoch done.

    Args:
        console: where to write.
        epochs: in the whole run.
        steps: in the whole run.
        score: what `metrics.jsonl` calls the running score of training.
    """

    def __init__(self, console: Console, epochs: int, steps: int, score: str = "top1") -> None:
        self.console = console
        self.epochs = epochs
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn(
                f"{{task.fields[rate]:,.0f}} images/s · loss {{task.fields[loss]:.3f}} · {WORDS[score]} "
                "{task.fields[top1]:.1%} ·"
            ),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            speed_estimate_period=120,
        )
        self.task = self.bar.add_task("train", total=steps, epoch=0, epochs=epochs, rate=0.0, loss=0.0, top1=0.0)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def show_step(self, epoch: int, step: int, rate: float, loss: float, top1: float) -> None:
        """Move the bar to `step`, with the running means of the epoch under way (from 0)."""
        self.bar.update(self.task, completed=step, epoch=epoch + 1, rate=rate, loss=loss, top1=top1)

    def say(self, text: str) -> None:
        """Print a line, unless there is nothing to say."""
        if text:
            self.console.print(text, highlight=False, soft_wrap=True)

    def show_epoch(self, record: Record, seconds_left: float) -> None:
        """Print a line for an epoch done."""
        minutes, seconds = divmod(round(seconds_left), 60)
        self.console.print(
            f"epoch {record['epoch']}/{self.epochs}  "
            f"train loss {record['train_loss']:.3f} {scores(record, 'train_')}  "
            f"held-out loss {record['val_loss']:.3f} {scores(record, 'val_')}  "
            f"{record['images_per_s']:,.0f} images/s  {minutes}:{seconds:02d} left",
            highlight=False,
            soft_wrap=True,
        )


def scores(record: Record, part: str) -> str:
    """The scores of a part of the images, such as `accuracy 91.20%`, by the beginning of their keys."""
    found = {word: record[part + name] for name, word in WORDS.items() if part + name in record}
    return " ".join(f"{word} {value:.2%}" for word, value in found.items())
