"""What frozen parents see of images, computed once and kept on disk in half precision.

Every image passes each parent once; heads are then fitted and trained on the kept rows. A file is named by all that its
rows follow from (weights, preprocessing, pixels), so that those of other weights are never used; one that has the rows
of more images serves for some of them, such as a check-up's for the training that leaves out what it found. Rows are
appended and checked block by block: what a kill or a full disk leaves is gone on with. They are mapped, never read into
memory.

    HOW-IMAGES.f16      the rows; HOW is a hash of parents, preprocessing and arithmetic, IMAGES one of the pixels
    HOW-IMAGES.images   the images' checksums, uint64
    HOW-IMAGES.json     a checksum for each block of rows
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tokenfusion.classifier import Classifier
from tokenfusion.data.cache import default_cache
from tokenfusion.data.decoded import Images
from tokenfusion.data.loader import Views, view_batches
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.data.readers import Reader
from tokenfusion.errors import InputError
from tokenfusion.files import write_bytes, write_json
from tokenfusion.hardware import autocast, resolve_precision
from tokenfusion.models.probe_fusion import ProbeFusion

BLOCK = 64
"""Images that pass the parents at once, and after which what is kept is safe."""
IMAGES = ".images"
"""Ending of the checksums beside kept rows."""


@dataclass(frozen=True, eq=False)
class FeatureRows(Reader):
    """What the parents saw of an image, in the place of the image."""

    path: Path
    rows: np.ndarray
    """float16 (views · N, F), mapped: a row of every image as it is, then one of every image augmented, and so on."""

    def read(self, index: int) -> Tensor:
        return torch.from_numpy(self.rows[index])[:, None, None]


class NoPreprocess(Preprocess):
    """Features are as the model wants them."""

    def resize(self, image: Tensor) -> Tensor:
        return image

    def normalize(self, batch: Tensor) -> Tensor:
        return batch.float()


class FeatureClassifier(Classifier):
    """A classifier of features (B, F, 1, 1) in the place of images (B, in_chans, h, w)."""

    @torch.inference_mode()
    def logits(self, batch: Tensor) -> Tensor:
        self.model.eval()
        with autocast(self.device, self.precision):
            return FeatureHead(cast(ProbeFusion, self.model))(self.to_input(batch)).float().cpu()


class FeatureHead(nn.Module):
    """The part of a model that is trained on features: all of it but its parents.

    Args:
        model: whose parents are frozen.
    """

    def __init__(self, model: ProbeFusion) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> Tensor:
        """Features (B, F, 1, 1) to logits (B, K)."""
        return self.model.decide(rows.flatten(1))


def on_features(classifier: Classifier) -> FeatureClassifier:
    """A classifier that shares its model with this one, and is given features."""
    return FeatureClassifier(**vars(classifier) | {"preprocess": NoPreprocess(**vars(classifier.preprocess))})


def on_images(classifier: Classifier) -> Classifier:
    """The inverse of `on_features`; a classifier of images is left as it is."""
    return Classifier(**vars(classifier) | {"preprocess": Preprocess(**vars(classifier.preprocess))})


@dataclass(frozen=True, eq=False)
class Features:
    """What frozen parents saw of images.

    Attributes:
        images: N of them.
        rows: what was seen of these, and perhaps of others.
        which: int64 (views, N): the row of each image and view.
    """

    images: Images
    rows: FeatureRows
    which: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int64 (views · N,), row by row."""
        return np.tile(self.images.labels.numpy(), len(self.which))

    def subset(self, indices: np.ndarray, views: int | None = None) -> "Features":
        """Some of the images, with all views or the first ones."""
        return Features(self.images.subset(indices), self.rows, self.which[:views, indices])

    def as_images(self) -> Images:
        """Rows in the place of the images, each view one of its own."""
        each = self.images.subset(np.tile(np.arange(len(self.images)), len(self.which)))
        dataset = replace(each.dataset, reader=self.rows, rows=self.which.ravel(), shards=None)
        found = replace(each, dataset=dataset, max_pixels=1, cached=True)
        found.weights = each.weights
        return found

    def batches(self, size: int = 512) -> Iterator[Tensor]:
        """Rows in float32, (B, F), some at a time."""
        which = self.which.ravel()
        for start in range(0, len(which), size):
            yield torch.from_numpy(self.rows.rows[which[start : start + size]]).float()


def keep_features(
    classifier: Classifier,
    images: Images,
    *,
    views: int = 1,
    augment: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
) -> Features:
    """What a model's parents see of images, from disk where it was kept before.

    Args:
        classifier: of a `ProbeFusion`, whose parents are not trained.
        images: that were looked at, so that their pixels' checksums are known.
        views: how often the parents look at each: once as it is, then augmented, each time anew.
        augment, seed: makes a view of an image; what is random in it follows from the seed, the view and the image.
        workers: processes that decode what is not in memory.
        progress: called with the number of views done, and of all.
        folder: where to keep rows; `features` in the cache of TOKENFUSION_CACHE when not given.

    Raises:
        InputError: the rows would take more than TOKENFUSION_CACHE_GB, or the disk is full: what is kept by then is
            gone on with the next time.
    """
    model, cache = cast(ProbeFusion, classifier.model), default_cache()
    folder = folder or cache.folder / "features"
    if images.checksums is None:
        raise InputError(
            "images in shards are not looked at before training, and what frozen parents see of them cannot be kept; "
            "give a folder, Parquet files or a tar, or a single model, such as --model resnet50 --pretrained hub"
        )
    how = key_of(classifier, [views, seed, vars(augment) if augment else None] if views > 1 else [1])
    path = folder / f"{how}-{blake2b(images.checksums.tobytes(), digest_size=16).hexdigest()}.f16"
    shape, which = (views * len(images), model.row_length), np.arange(views * len(images))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replace(cache, folder=folder).lock(path.stem):
            done = whole_rows(path, shape)
            if done < shape[0] and views == 1 and (found := find_rows(folder, how, images.checksums, shape[1])):
                path, which, shape = found
            elif done < shape[0]:
                make_room(folder, 2 * shape[0] * shape[1], cache.limit, path)
                write_bytes(path.with_suffix(IMAGES), images.checksums.tobytes())
                coming = Views(images, classifier.preprocess, augment, seed, range(done, shape[0]))
                append_rows(classifier, coming, path, done, shape, workers, progress)
            os.utime(path)
            rows = FeatureRows(path, np.memmap(path, np.float16, "c", shape=shape))  # stays, even if another makes room
    except OSError as error:
        raise InputError(
            f"{path} could not be kept: {error.strerror}; what there is of it is gone on with: make room, or name "
            "another folder by TOKENFUSION_CACHE, then run the command again"
        ) from error
    return Features(images, rows, which.reshape(views, -1))


def key_of(classifier: Classifier, how: list[Any]) -> str:
    """A name for all that kept rows follow from but the pixels: parents, preprocessing, views, arithmetic."""
    digest = blake2b(digest_size=16)
    for name, tensor in classifier.model.state_dict().items():
        if name.startswith(("cnn.", "vit.")):
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
    precision = resolve_precision(classifier.precision, classifier.device)
    layers = cast(ProbeFusion, classifier.model).read_layers
    described = [classifier.preprocess.to_dict(), precision, str(classifier.device), classifier.name, layers, *how]
    digest.update(json.dumps(described).encode())
    return digest.hexdigest()


def find_rows(
    folder: Path, how: str, checksums: np.ndarray, length: int
) -> tuple[Path, np.ndarray, tuple[int, int]] | None:
    """A whole file that has the rows of all these images among others', which rows they are (N,), and its shape."""
    for path in folder.glob(f"{how}-*.f16"):
        try:
            known = np.fromfile(path.with_suffix(IMAGES), np.uint64)
        except OSError:  # another process is making room
            continue
        if len(known) < len(checksums):
            continue
        order, shape = np.argsort(known), (len(known), length)
        which = order[np.searchsorted(known, checksums, sorter=order).clip(max=len(known) - 1)]
        if np.array_equal(known[which], checksums) and whole_rows(path, shape) == len(known):
            return path, which, shape
    return None


def whole_rows(path: Path, shape: tuple[int, int]) -> int:
    """How many rows of a file are whole: those before its first block that is damaged, or was not noted."""
    try:
        noted = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        count = 0
        with path.open("rb") as file:
            for checksum in noted:
                block = file.read(2 * shape[1] * min(BLOCK, shape[0] - count))
                if not block or zlib.crc32(block) != checksum:
                    break
                count += len(block) // (2 * shape[1])
        return count
    except (OSError, ValueError, TypeError):
        return 0


def append_rows(
    classifier: Classifier,
    coming: Views,
    path: Path,
    done: int,
    shape: tuple[int, int],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Let the views that are missing pass the parents, a block at a time, each noted once it is on the disk."""
    notes = path.with_suffix(".json")
    checksums = json.loads(notes.read_text(encoding="utf-8"))[: done // BLOCK] if done else []
    with path.open("r+b" if done else "wb") as file:
        file.truncate(2 * done * shape[1])
        file.seek(0, os.SEEK_END)
        for rows in compute_rows(classifier, coming, workers):
            block = rows.numpy().tobytes()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            checksums.append(zlib.crc32(block))
            write_json(notes, checksums)
            if progress is not None:
                progress(min(len(checksums) * BLOCK, shape[0]), shape[0])


@torch.inference_mode()
def compute_rows(classifier: Classifier, coming: Views, workers: int = 0) -> Iterator[Tensor]:
    """What the parents see, float16 (B, F), a block of views at a time."""
    model = cast(ProbeFusion, classifier.model.eval())
    for batch, _ in view_batches(coming, BLOCK, 0 if coming.images.cached else workers):
        with autocast(classifier.device, classifier.precision):
            yield model.keep(classifier.to_input(batch)).half().cpu()


def make_room(folder: Path, size: int, limit: int, path: Path) -> None:
    """Remove the kept files that were used longest ago until one of so many bytes fits, but none that is written to."""
    from filelock import FileLock, Timeout

    if size > limit:
        raise InputError(
            f"what the parents see takes {size / 2**30:.3g} GiB, more than the {limit / 2**30:.3g} GiB of the cache; "
            "allow more by TOKENFUSION_CACHE_GB, take a smaller --img-size, or train without --tune"
        )
    others = sorted((p for p in folder.glob("*.f16") if p != path), key=os.path.getmtime)
    total = size + sum(map(os.path.getsize, others))
    for other in others:
        if total <= limit:
            break
        with suppress(OSError, Timeout), FileLock(other.with_suffix(".lock"), timeout=0):
            total -= os.path.getsize(other)
            for file in (other, other.with_suffix(".json"), other.with_suffix(IMAGES)):
                file.unlink(missing_ok=True)
