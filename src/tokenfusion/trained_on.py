"""Which images a run was trained on, and which it held out: known by their pixels, wherever they lie now."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from tokenfusion.checkpoint import load_tensors, save_tensors
from tokenfusion.data.decoded import Images
from tokenfusion.data.kinds import is_path
from tokenfusion.errors import InputError
from tokenfusion.recipe import Recipe

TRAINED_ON = "trained_on.safetensors"
"""In a run folder: checksums of the images, int64 (N,) and ascending, as `training` and `held_out`."""


@dataclass(frozen=True)
class TrainedOn:
    """Checksums of a run's images, int64; None of images in shards, which are not looked at before training."""

    training: np.ndarray | None
    held_out: np.ndarray | None
    from_here: Mapping[str, str] = field(default_factory=dict)
    """The recipe's `data` and `root`, seen from the run folder, should all be moved together."""

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


def save_trained_on(run: Path, recipe: Recipe, training: Images, held_out: Images) -> None:
    """Write which images a run is trained on and which it holds out, and where they lie, seen from its folder."""
    parts = {"training": training.checksums, "held_out": held_out.checksums}
    tensors = {
        name: torch.from_numpy(np.sort(signed(checksums))) for name, checksums in parts.items() if checksums is not None
    }
    places = {"data": recipe.data, "root": recipe.root}
    from_here = {name: os.path.relpath(path, run.resolve()) for name, path in places.items() if is_path(path)}
    save_tensors(run / TRAINED_ON, tensors, {"from_here": from_here})


def found_again(recipe: Recipe, run: Path) -> Recipe:
    """A run's recipe whose images are where they were, or else where they are if they were moved along with the run."""
    if is_path(recipe.data):
        return recipe
    moved = {name: os.path.normpath(run.resolve() / path) for name, path in load_trained_on(run).from_here.items()}
    there = {name: path for name, path in moved.items() if is_path(path) and not is_path(getattr(recipe, name))}
    return replace(recipe, data=there["data"], root=there.get("root", recipe.root)) if "data" in there else recipe


def is_places(value: object) -> bool:
    """Whether a value says where data and root lie."""
    known = isinstance(value, dict) and value.keys() <= {"data", "root"}
    return known and all(isinstance(path, str) for path in cast("dict[str, object]", value).values())


def load_trained_on(run: Path) -> TrainedOn:
    """What `save_trained_on` wrote; nothing is known of a run of an older version.

    Raises:
        InputError: the file is damaged.
    """
    if not (run / TRAINED_ON).exists():
        return TrainedOn(None, None)
    tensors, description = load_tensors(run / TRAINED_ON)
    from_here = description.get("from_here", {}) if isinstance(description, dict) else None
    if not is_places(from_here) or any(tensor.dtype != torch.int64 or tensor.ndim != 1 for tensor in tensors.values()):
        raise InputError(
            f"{run / TRAINED_ON} is damaged: it holds no checksums; take it away, and they are not compared"
        )
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return TrainedOn(arrays.get("training"), arrays.get("held_out"), cast("dict[str, str]", from_here))
