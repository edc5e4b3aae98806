"""What frozen parents see of images, computed once and kept on disk in half precision.

Every image passes each parent once; heads are then fitted and trained on the kept rows. A file is named by all that its
rows follow from (weights, preprocessing, pixels), so that those of other weights are never used. Rows are appended and
checked block by block: what a kill or a full disk leaves is gone on with. They are mapped, never read into memory.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tokenfusion.classifier import Classifier
from tokenfusion.data.cache import default_cache
from tokenfusion.data.decoded import Images
from tokenfusion.data.loader import eval_batches
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.data.readers import Reader
from tokenfusion.errors import InputError
from tokenfusion.files import write_json
from tokenfusion.hardware import autocast
from tokenfusion.models.probe_fusion import ProbeFusion

BLOCK = 64
"""Images that pass the parents at once, and after which what is kept is safe."""


@dataclass(frozen=True, eq=False)
class Rows(Reader):
    """Kept rows in the place of images."""

    path: Path
    rows: np.ndarray
    """float16 (N, F), mapped."""

    def read(self, index: int) -> Tensor:
        return torch.from_numpy(self.rows[index])[:, None, None]


class AsKept(Preprocess):
    """Kept rows are as the model wants them."""

    def resize(self, image: Tensor) -> Tensor:
        return image

    def normalize(self, batch: Tensor) -> Tensor:
        return batch.float()


class KeptClassifier(Classifier):
    """A classifier of kept rows (B, F, 1, 1) in the place of images (B, in_chans, h, w)."""

    @torch.inference_mode()
    def logits(self, batch: Tensor) -> Tensor:
        self.model.eval()
        with autocast(self.device, self.precision):
            return Decider(cast(ProbeFusion, self.model))(self.to_input(batch)).float().cpu()


class Decider(nn.Module):
    """The part of a model that decides by what its parents saw.

    Args:
        model: whose parents are frozen.
    """

    def __init__(self, model: ProbeFusion) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (B, F, 1, 1) to logits (B, K)."""
        return self.model.decide(rows.flatten(1))


def of_kept(classifier: Classifier) -> KeptClassifier:
    """The classifier that shares a classifier's model, and is given kept rows."""
    return KeptClassifier(**vars(classifier) | {"preprocess": AsKept(**vars(classifier.preprocess))})


def of_images(classifier: Classifier) -> Classifier:
    """The inverse of `of_kept`; a classifier of images as it is."""
    return Classifier(**vars(classifier) | {"preprocess": Preprocess(**vars(classifier.preprocess))})


def kept(images: Images, rows: Rows) -> Images:
    """The images with rows in the place of pixels; they are told apart by their pixels' checksums as before."""
    dataset = replace(images.dataset, reader=rows, rows=None, shards=None)
    return Images(dataset, max_pixels=1, cached=True, checksums=images.checksums)


def keep_features(
    classifier: Classifier,
    images: Images,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
) -> Rows:
    """What a model's parents see of images, from disk where it was kept before.

    Args:
        classifier: of a `ProbeFusion`, whose parents are not trained.
        images: that were looked at, so that their pixels' checksums are known.
        workers: processes that decode what is not in memory.
        progress: called with the number of images done, and of all.
        folder: where to keep rows; `features` in the cache of TOKENFUSION_CACHE when not given.

    Raises:
        InputError: the rows would take more than TOKENFUSION_CACHE_GB, or the disk is full: what is kept by then is
            gone on with the next time.
    """
    model, cache = cast(ProbeFusion, classifier.model), default_cache()
    folder = folder or cache.folder / "features"
    path = folder / f"{key_of(classifier, images)}.f16"
    shape = len(images), model.row_length
    size = 2 * shape[0] * shape[1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replace(cache, folder=folder).lock(path.stem):
            done = whole_rows(path, shape)
            if done < len(images):
                make_room(folder, size, cache.limit, path)
                append_rows(classifier, images, path, done, workers, progress)
            os.utime(path)
            rows = Rows(path, np.memmap(path, np.float16, "c", shape=shape))  # stays, even if another makes room
    except OSError as error:
        raise InputError(
            f"{path} could not be kept: {error.strerror}; what there is of it is gone on with: make room, or name "
            "another folder by TOKENFUSION_CACHE, then run the command again"
        ) from error
    return rows


def key_of(classifier: Classifier, images: Images) -> str:
    """A name for all that kept rows follow from: parents, preprocessing, arithmetic, and pixels in their order."""
    if images.checksums is None:
        raise InputError(
            "images in shards are not looked at before training, and what frozen parents see of them cannot be kept; "
            "give a folder, Parquet files or a tar, or leave out --tune"
        )
    digest = blake2b(digest_size=16)
    for name, tensor in classifier.model.state_dict().items():
        if name.startswith(("cnn.", "vit.")):
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
    how = [
        classifier.preprocess.to_dict(),
        classifier.precision,
        str(classifier.device),
        classifier.name.partition(",")[0],
    ]
    digest.update(json.dumps(how).encode() + images.checksums.tobytes())
    return digest.hexdigest()


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
    images: Images,
    path: Path,
    done: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Let the images that are missing pass the parents, a block at a time, each noted once it is on the disk."""
    notes = path.with_suffix(".json")
    checksums = json.loads(notes.read_text(encoding="utf-8"))[: done // BLOCK] if done else []
    with path.open("r+b" if done else "wb") as file:
        file.truncate(2 * len(checksums) * BLOCK * row_length(classifier))
        file.seek(0, os.SEEK_END)
        remaining = range(len(checksums) * BLOCK, len(images))
        for rows in seen_rows(classifier, images, remaining, workers):
            block = rows.numpy().tobytes()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            checksums.append(zlib.crc32(block))
            write_json(notes, checksums)
            if progress is not None:
                progress(min(len(checksums) * BLOCK, len(images)), len(images))


def row_length(classifier: Classifier) -> int:
    return cast(ProbeFusion, classifier.model).row_length


@torch.inference_mode()
def seen_rows(classifier: Classifier, images: Images, indices: Sequence[int], workers: int) -> Iterator[Tensor]:
    """What the parents see, float16 (B, F), a block of images at a time."""
    model = cast(ProbeFusion, classifier.model.eval())
    workers = 0 if images.cached else workers
    for batch, _ in eval_batches(images, classifier.preprocess, batch_size=BLOCK, workers=workers, indices=indices):
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
            for file in (other, other.with_suffix(".json")):
                file.unlink()


def batches_of(rows: np.ndarray, size: int = 512) -> Iterator[Tensor]:
    """Kept rows in float32, (B, F), some at a time."""
    for start in range(0, len(rows), size):
        yield torch.from_numpy(rows[start : start + size]).float()
