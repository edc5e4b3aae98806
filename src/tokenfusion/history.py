"""The history of a run: what `metrics.jsonl` says of each of its epochs."""

from pathlib import Path
from typing import Any

from tokenfusion.json_files import NUMBER, SHARE, Shape, read_json_lines, require_shape

HISTORY = "metrics.jsonl"
"""Its file in a run folder."""
EPOCH: dict[str, Shape] = {
    "epoch": int,
    "lr": NUMBER,
    "train_loss": SHARE,
    "val_loss": SHARE,
    "seconds": NUMBER,
    "images_per_s": NUMBER,
    "*": SHARE,
}
"""What each line must hold."""


def read_history(run: Path) -> list[dict[str, Any]]:
    """What is known of each epoch that a run has done, in order; nothing where it has done none.

    Raises:
        InputError: the file is damaged.
    """
    path = run / HISTORY
    epochs: list[dict[str, Any]] = read_json_lines(path) if path.is_file() else []
    for epoch in epochs:
        several = isinstance(epoch, dict) and "val_map" in epoch
        measured = ("train_exact_match", "val_map") if several else ("train_top1", "val_top1")
        require_shape(epoch, EPOCH | dict.fromkeys(measured, SHARE), path)
    return epochs
