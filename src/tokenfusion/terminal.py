"""What verbs say to a person or a script: the two consoles, and results as tables or JSON."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

from cyclopts import Parameter

from tokenfusion.formatting import PlainConsole
from tokenfusion_runtime.output import json_text

AsJson = Annotated[bool, Parameter(name="--json", negative="")]

for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # what was closed, as by `>&-`, is nowhere
    if getattr(sys, name) is None:
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process

# a pipe or a file gets whole lines, however long
console = PlainConsole(markup=False, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 10_000)
stderr = PlainConsole(stderr=True, markup=False, highlight=False, soft_wrap=True)


def end_stopped(words: str) -> NoReturn:
    """End the command after Ctrl-C, with a last line; what is pressed while the process ends is the same wish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stderr.print(f"\n{words}")
    sys.exit(130)


def show(result: Any, as_json: bool, table: Sequence[Sequence[str]] = (), lines: Sequence[str] = ()) -> None:
    """Print a result as JSON, or else as a table whose first line has the headings, and lines below it."""
    if as_json:
        print(json_text(result, indent=2))
        return
    if table:
        from rich.table import Table

        first, *headings = table[0]
        columns = Table(first, box=None, pad_edge=False)
        for heading in headings:
            columns.add_column(heading, justify="right")
        for row in table[1:]:
            columns.add_row(*row)
        console.print(columns)
    for line in lines:
        console.print(line)
