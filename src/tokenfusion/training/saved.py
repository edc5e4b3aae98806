"""Where a run folder keeps what it needs to go on, and whether it is there."""

from pathlib import Path

CHECKPOINT = Path("state", "last.safetensors")
"""All that a run needs to go on."""
START = Path("state", "start.safetensors")
"""What all stages of a run that is trained in stages start from: the parents, and the linear classifier."""


def pointer_of(path: Path) -> Path:
    """The file that names the folder of a checkpoint of this name whose parts several processes wrote."""
    return path.with_suffix(".json")


def is_saved(path: Path) -> bool:
    """Whether there is a checkpoint of this name, in one file or in parts."""
    return path.exists() or pointer_of(path).exists()


def last_good(path: Path) -> str:
    """What is left to a run that cannot go on."""
    return f"the last good checkpoint is kept as {path};" if is_saved(path) else "there is no checkpoint yet;"
