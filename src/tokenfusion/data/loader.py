"""Batches for training and evaluation. What a batch holds depends on the seed, the epoch and the step alone."""

import hashlib
import signal
import struct
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from tokenfusion.data.images import Images
from tokenfusion.data.transforms import Augment, Preprocess
from tokenfusion.errors import InputError

Batch = tuple[Tensor, Tensor]
"""Images uint8 (B, C, h, w) and labels int64 (B,)."""

Key = tuple[int, int]
"""Epoch, and index of an image."""


class TrainLoader:
    """Augmented batches in a random order, the same to the bit for any number of workers and from any start.

    The order follows from (seed, epoch), an image's augmentation from (seed, epoch, index).

    Args:
        images: what to train on.
        augment: what to do with each; draws from torch's default generator.
        batch_size: images per batch; all of them if there are fewer.
        seed: decides order and augmentation.
        workers: processes that augment; 0 for none but this.

    Raises:
        InputError: there are no images.
    """

    def __init__(self, images: Images, augment: Augment, *, batch_size: int, seed: int, workers: int) -> None:
        if len(images) == 0:
            raise InputError("there is no readable image to train on; look at skipped.csv for the reasons")
        self.order = RandomOrder(len(images), min(batch_size, len(images)), seed)
        self.loader = DataLoader(
            AugmentedImages(images, augment, seed),
            batch_sampler=self.order,
            num_workers=workers,
            collate_fn=as_it_is,
            worker_init_fn=ignore_interrupts,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # otherwise starting an epoch would draw from the caller's
        )
        self.iterator: Iterator[Batch | InputError] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches per epoch; the images left over are others in every epoch."""
        return self.order.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from step `start` on.

        Yields:
            images uint8 (B, C, h, w) and labels int64 (B,).

        Raises:
            InputError: an image has become unreadable, or a worker process has died.
        """
        self.order.epoch, self.order.start = epoch, start
        self.iterator = start_workers(self.loader)
        yield from guarded(self.iterator)

    def close(self) -> None:
        """End the workers."""
        end_workers(self.iterator)
        self.iterator = None


def eval_batches(images: Images, preprocess: Preprocess, *, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Every image once, in order; the last batch may be smaller.

    Yields:
        images uint8 (B, in_chans, h, w), not yet normalised, and labels int64 (B,).

    Raises:
        InputError: an image has become unreadable, or a worker process has died.
    """
    loader = DataLoader(
        ResizedImages(images, preprocess),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=as_it_is,
        generator=torch.Generator(),
    )
    iterator = start_workers(loader)
    try:
        yield from guarded(iterator)
    finally:
        end_workers(iterator)


class RandomOrder(Sampler[list[Key]]):
    """The keys of each batch of an epoch; `epoch` and `start` are set before it is iterated over."""

    def __init__(self, images: int, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.steps = images // batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator)
        for step in range(self.start, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, index) for index in batch.tolist()]


class AugmentedImages(Dataset[Batch]):
    """A batch of images at once, each augmented by randomness of its own."""

    def __init__(self, images: Images, augment: Augment, seed: int) -> None:
        self.images, self.augment, self.seed = images, augment, seed

    def __getitems__(self, keys: list[Key]) -> Batch | InputError:
        generator = torch.default_generator
        state = generator.get_state()
        try:
            batch = []
            for epoch, index in keys:
                generator.manual_seed(mix(self.seed, epoch, index))
                batch.append(self.augment(self.images[index]))
        except InputError as error:
            return error
        finally:
            generator.set_state(state)
        return stack(batch), self.images.labels[[index for _, index in keys]]


class ResizedImages(Dataset[Batch]):
    """A batch of images at once, as a model is evaluated on them."""

    def __init__(self, images: Images, preprocess: Preprocess) -> None:
        self.images, self.preprocess = images, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch | InputError:
        try:
            batch = [self.preprocess.resize(self.images[index]) for index in indices]
        except InputError as error:
            return error
        return stack(batch), self.images.labels[indices]


def stack(images: list[Tensor]) -> Tensor:
    """Images (C, h, w) as a batch (B, C, h, w) in channels-last memory; collating in a worker makes it shared."""
    batch: Tensor = default_collate([image.permute(1, 2, 0) for image in images])
    return batch.permute(0, 3, 1, 2)


def mix(*numbers: int) -> int:
    """A seed of 63 bits in which every bit of every number counts; neighbouring numbers give unrelated seeds."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def as_it_is(batch: Any) -> Any:
    """The datasets give whole batches, or an error as a value: raised, it would bring a worker's traceback along."""
    return batch


def ignore_interrupts(_worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the training process alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def start_workers(loader: DataLoader[Batch]) -> Iterator[Batch | InputError]:
    """Begin an epoch. Should a worker die, only the wait for its batch shall fail.

    torch also installs a SIGCHLD handler that raises wherever the main thread happens to be, in the middle of an
    optimiser step or of writing a checkpoint; it is put back to what it was.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def guarded(batches: Iterator[Batch | InputError]) -> Iterator[Batch]:
    """The batches; what went wrong in a worker is raised here."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError(
                f"a loader process died ({error}); most often memory ran out: "
                "use fewer workers, a smaller cache or smaller batches"
            ) from error
        if isinstance(batch, InputError):
            raise batch
        yield batch


def end_workers(iterator: Iterator[Batch | InputError] | None) -> None:
    """Tell the worker processes of an epoch to end, and wait for them."""
    shut_down = getattr(iterator, "_shutdown_workers", None)  # an iterator without workers has none
    if shut_down is not None:
        shut_down()
