"""How long each part of a run in stages took, and what was estimated before it began: `times.json`."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from tokenfusion.errors import InputError
from tokenfusion.files import write_json
from tokenfusion.formatting import duration
from tokenfusion.json_files import read_json

TIMES = "times.json"
FEATURES, FIT, JUDGE = "features", "fit", "judging"
"""What every run in stages does: let the parents look, fit linear classifiers, judge them on held-out images."""


@contextmanager
def timed(folder: Path, part: str) -> Iterator[None]:
    """Add the seconds that a part of a run takes to those that it took before the run was interrupted."""
    clock = perf_counter()
    try:
        yield
    finally:
        times = read_times(folder)
        times["seconds"][part] = times["seconds"].get(part, 0.0) + perf_counter() - clock
        with suppress(InputError):  # on a full disk what it interrupts has more to say
            write_json(folder / TIMES, times)


def note_estimate(folder: Path, seconds: float) -> None:
    """Keep what a run was estimated to take, in seconds, to be compared with what it took."""
    write_json(folder / TIMES, read_times(folder) | {"estimated": seconds})


def read_times(folder: Path) -> dict[str, Any]:
    """`seconds` by the part that took them, and `estimated` where an estimate was made."""
    path = folder / TIMES
    return read_json(path, "remove it") if path.is_file() else {"seconds": {}}


def seconds_until_judged(folder: Path) -> float:
    """What a run took until its linear classifiers could be judged."""
    seconds = read_times(folder)["seconds"]
    return float(seconds.get(FEATURES, 0.0) + seconds.get(FIT, 0.0))


def times_in_words(folder: Path) -> str:
    """What a run took, part by part, and what was estimated."""
    times = read_times(folder)
    parts = ", ".join(f"{part} {duration(seconds)}" for part, seconds in times["seconds"].items())
    estimated = f"; about {duration(times['estimated'])} were estimated" if "estimated" in times else ""
    return f"took {duration(sum(times['seconds'].values()))}: {parts}{estimated}"
