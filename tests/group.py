"""Several processes on this machine that train together, as a launcher would start them."""

import os
import socket
import sys
from pathlib import Path

from children import begin
from tokenfusion import cli
from tokenfusion.recipe import Recipe


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def as_one_of(rank, size, port, work, words):
    """What torchrun does for each of its processes; what it prints goes to a file."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    work(rank, *words)


def launch(size, work, *words):
    port = free_port()
    return [begin(as_one_of, rank, size, port, work, words) for rank in range(size)]


def run_all(size, work, *words):
    group = launch(size, work, *words)
    for process in group:
        process.join(timeout=240)
    return [process.exitcode for process in group]


def train_or_resume(rank, recipe, run):
    """As `tokenfusion train` does, which tells a person why it ends."""
    sys.stderr = sys.stdout = open(f"{run}.{rank}.txt", "w", buffering=1)  # noqa: SIM115
    cli.stderr.file = cli.console.file = sys.stdout
    cli.console.quiet = False
    sys.argv = ["tokenfusion", "train", "--resume", str(run)]
    if not (run / "recipe.toml").exists():
        sys.argv = ["tokenfusion", "train", "--out", str(run), *options(recipe)]
    cli.main()


def options(recipe):
    """A recipe as options of the command."""
    words = []
    for name, value in vars(recipe).items():
        if value != getattr(Recipe(), name):
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def said_by(run):
    return [Path(f"{run}.{rank}.txt").read_text() for rank in range(2)]
