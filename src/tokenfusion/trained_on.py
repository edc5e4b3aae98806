"""Which images a run was trained on, and which it held out: known by their pixels, wherever they lie now."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tokenfusion.checkpoint import load_tensors, save_tensors
from tokenfusion.data.decoded import Images
from tokenfusion.errors import InputError

TRAINED_ON = "trained_on.safetensors"
"""In a run folder: checksums of the images, int64 (N,) and ascending, as `training` and `held_out`."""


@dataclass(frozen=True)
class TrainedOn:
    """Checksums of a run's images, int64; None of images in shards, which are not looked at before training."""

    training: np.ndarray | None
    held_out: np.ndarray | None

    def met(self, images: Images) -> np.ndarray | None:
        """Which of some images the run was trained on, bool (N,); None where that is not known."""
        if self.training is None or images.checksums is None:
            return None
        return np.isin(signed(images.checksums), self.training)

    def are_held_out(self, images: Images) -> bool:
        """Whether some images are those that the run held out, no more and no fewer."""
        if self.held_out is None or images.checksums is None:
            return False
        return np.array_equal(np.sort(signed(images.checksums)), self.held_out)


def signed(checksums: np.ndarray) -> np.ndarray:
    """Checksums as safetensors can hold them."""
    return checksums.astype(np.uint64).view(np.int64)


def save_trained_on(run: Path, training: Images, held_out: Images) -> None:
    """Write which images a run is trained on and which it holds out."""
    parts = {"training": training.checksums, "held_out": held_out.checksums}
    tensors = {
        name: torch.from_numpy(np.sort(signed(checksums))) for name, checksums in parts.items() if checksums is not None
    }
    save_tensors(run / TRAINED_ON, tensors)


def load_trained_on(run: Path) -> TrainedOn:
    """What `save_trained_on` wrote; nothing is known of a run of an older version.

    Raises:
        InputError: the file is damaged.
    """
    if not (run / TRAINED_ON).exists():
        return TrainedOn(None, None)
    tensors, _ = load_tensors(run / TRAINED_ON)
    if any(tensor.dtype != torch.int64 or tensor.ndim != 1 for tensor in tensors.values()):
        raise InputError(
            f"{run / TRAINED_ON} is damaged: it holds no checksums; take it away, and they are not compared"
        )
    training, held_out = (tensors.get(name) for name in ("training", "held_out"))
    return TrainedOn(*(None if part is None else part.numpy() for part in (training, held_out)))
