"""What a person reads: counts with their nouns, durations, names without control characters, and bars."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from tokenfusion_runtime.output import spelled_out


class Show(Protocol):
    """Told how far a task is: its name, what is done, all there is to do, and what to say where that is no name."""

    def __call__(self, task: str, done: int, total: int, text: str = "") -> None: ...


@contextmanager
def bars(console: Console, *columns: Any, **options: Any) -> Iterator[Show]:
    """A bar for each task on a terminal, nothing elsewhere; columns and options as of rich's `Progress`."""
    from rich.progress import Progress, TaskID

    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True, **options) as progress:
        tasks: dict[str, TaskID] = {}

        def show(task: str, done: int, total: int, text: str = "") -> None:
            if task not in tasks:
                tasks[task] = progress.add_task(task)
            progress.update(tasks[task], completed=done, total=total, description=text or task)

        yield show


Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and all there is to do."""


def unheard(_task: str, _done: int, _total: int) -> None:
    """A `Progress` that nobody looks at."""


@contextmanager
def counting_tasks() -> Iterator[Progress]:
    """A bar for each of several tasks, one after the other; gives what to call."""
    with bars(Console(stderr=True)) as show:
        yield show


@contextmanager
def counting(task: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for a single task; gives what to call with (done, in all)."""
    with bars(Console(stderr=True)) as show:
        yield partial(show, task)


def abridged(text: str, longest: int) -> str:
    """A text of at most about so many characters: of a longer one its beginning and its end, and how long it is."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} … {text[-longest // 4 :]} ({len(text):,} characters)"


class PlainConsole(Console):
    """A console on which no name of a class or file can move the cursor, clear the screen or colour what follows."""

    outlives_reader = False
    """Whether work goes on, quietly, where nobody reads its lines any more, as behind `| head -1`."""

    def on_broken_pipe(self) -> None:
        """What is done where the reader has gone; without it rich ends the process."""
        if not self.outlives_reader:
            super().on_broken_pipe()
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def render_str(self, text: str, **options: Any) -> Text:
        """Text as it is shown; rich's own colours come after it."""
        return super().render_str(spelled_out(text, layout=True), **options)


def counted(n: int, noun: str) -> str:
    """A number with its noun, in the plural where that is due."""
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("s") else "s")


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {round(seconds) % 60} s"
