"""Batches for training and evaluation. What a batch holds depends on the seed, the epoch and the step alone."""

import copy
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset

from tokenfusion.data.decode import Hearing, UnreadableImage
from tokenfusion.data.decoded import Images
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.data.remote import Prefetcher
from tokenfusion.data.sampler import Key, RandomOrder, ShardOrder, Share, choose_order, derive_seed
from tokenfusion.errors import InputError

Batch = tuple[Tensor, ...]
"""Images uint8 (B, C, h, w); labels int64 (B,) or bool (B, K); while training on weighted images, weights (B,)."""


@dataclass(frozen=True)
class Noted:
    """A batch, and what is to be said of its images, by their indices."""

    batch: Batch
    unreadable: dict[int, str]
    """Why some could not be read, in whose place others stand."""
    damaged: dict[int, str]
    """What libjpeg says of those whose data is damaged and read as far as it goes."""

    def pin_memory(self) -> "Noted":
        """As the thread that pins batches calls it."""
        return replace(self, batch=tuple(part.pin_memory() for part in self.batch))


Loaded = Batch | Noted | InputError
"""What a worker gives; an error as a value, for raised, it would bring the worker's traceback along."""

OnUnreadable = Callable[[dict[int, str]], None]


class TrainLoader:
    """Augmented batches in a random order, the same to the bit for any number of workers and from any start.

    The order follows from (seed, epoch), an image's augmentation from (seed, epoch, index).

    Args:
        images: what to train on.
        augment: what to do with each; draws from torch's default generator.
        batch_size: images per batch, of all processes together; all of them if there are fewer.
        seed: decides order and augmentation.
        workers: processes that augment; 0 for none but this.
        balanced: whether classes are drawn evenly, rather than every image once an epoch.
        repeats: how often a batch has each of its images.
        share: the part of each batch that this process loads.
        on_unreadable: told of images that turn out to be unreadable, by index, with the reasons; the next image of
            the batch is drawn in the place of each.

    Attributes:
        damaged: JPEGs in shards that turned out to have damaged data, by name, and what libjpeg says of each.

    Raises:
        InputError: there are no images, or batches do not divide among the processes.
    """

    def __init__(
        self,
        images: Images,
        augment: Callable[[Tensor], Tensor],
        *,
        batch_size: int,
        seed: int,
        workers: int,
        balanced: bool = False,
        repeats: int = 1,
        share: Share = Share(),  # noqa: B008 - frozen
        on_unreadable: OnUnreadable | None = None,
    ) -> None:
        if len(images) == 0:
            raise InputError("there is no readable image to train on; look at skipped.csv for the reasons")
        size = min(batch_size, len(images))
        self.order = choose_order(images.labels, images.dataset.shards, size, seed, balanced, repeats)
        share.require_even(size)
        self.images, self.order.share, self.share = images, share, share
        self.on_unreadable = on_unreadable
        self.damaged: dict[str, str] = {}
        self.prefetcher = None
        if isinstance(self.order, ShardOrder):
            self.prefetcher = Prefetcher(images.dataset.reader.fetch)
            self.order.on_coming = self.prefetcher.want
        self.loader = WorkerLoader(
            AugmentedImages(images, augment, seed),
            batch_sampler=self.order,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),  # a copy to a GPU then need not be waited for
            collate_fn=as_it_is,
            worker_init_fn=ignore_interrupts,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # otherwise starting an epoch would draw from the caller's
        )
        self.iterator: Iterator[Loaded] | None = None

    @property
    def batch_size(self) -> int:
        """Images per batch, of all processes together."""
        return self.order.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches per epoch; the images left over are others in every epoch."""
        return self.order.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from step `start` on.

        Yields:
            `Batch`: images uint8 (B, C, h, w); labels; weights (B,) where images have them.

        Raises:
            InputError: an image has become unreadable, or a worker process has died.
        """
        self.order.epoch, self.order.start = epoch, start
        self.iterator = self.loader.begin()
        yield from guarded(self.iterator, self.loader.num_workers, self.note)

    def note(self, noted: Noted) -> None:
        """Tell of images that could not be read, and remember those with damaged data."""
        self.damaged |= {self.images.names[index]: said for index, said in noted.damaged.items()}
        if noted.unreadable and self.on_unreadable is not None:
            self.on_unreadable(noted.unreadable)

    def names_in(self, epoch: int, step: int) -> list[str]:
        """Names of the images in one batch, as far as this process loads it."""
        order = copy.copy(self.order)
        order.epoch, order.start = epoch, step
        return [self.images.names[index] for _, index, *_ in next(RandomOrder.__iter__(order))]

    def close(self) -> None:
        """End the workers, and what is fetched beside them."""
        if self.prefetcher:
            self.prefetcher.close()
        end_workers(self.iterator)
        self.iterator = None


def eval_batches(
    images: Images,
    preprocess: Preprocess,
    *,
    batch_size: int,
    workers: int = 0,
    indices: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every image once, in order, or those of some indices; the last batch may be smaller. See TrainLoader.

    Yields:
        images uint8 (B, in_chans, h, w), not yet normalised, and labels int64 (B,) or bool (B, K).

    Raises:
        InputError: an image has become unreadable, or a worker process has died.
    """
    return once(ResizedImages(images, preprocess), indices, batch_size, workers)


def view_batches(views: "Views", batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Views of images, in order, once each; see `eval_batches`."""
    return once(views, views.wanted, batch_size, workers)


def once(dataset: TorchDataset[Batch], indices: Sequence[int] | None, batch_size: int, workers: int) -> Iterator[Batch]:
    """Batches of a dataset in order, without what a random order would draw."""
    loader = WorkerLoader(
        dataset,
        batch_size=batch_size,
        sampler=indices,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),  # a copy to a GPU then need not be waited for
        collate_fn=as_it_is,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),
    )
    iterator = loader.begin()
    try:
        yield from guarded(iterator, workers)
    finally:
        end_workers(iterator)


class AugmentedImages(TorchDataset[Batch]):
    """A batch of images at once, each augmented by randomness of its own."""

    def __init__(self, images: Images, augment: Callable[[Tensor], Tensor], seed: int) -> None:
        self.images, self.augment, self.seed = images, augment, seed

    def __getitems__(self, keys: list[Key]) -> Loaded:
        generator = torch.default_generator
        state = generator.get_state()
        unreadable: dict[int, str] = {}
        damaged: dict[int, str] = {}
        try:
            loaded = [self.try_load(key, unreadable, damaged) for key in keys]
            indices = stand_ins([key[1] for key in keys], unreadable)
            batch = [
                self.load(key, index) if image is None else image
                for key, index, image in zip(keys, indices, loaded, strict=True)
            ]
        except InputError as error:
            return error
        finally:
            generator.set_state(state)
        labels, weights = self.images.labels[indices], self.images.weights
        whole = (stack(batch), labels) if weights is None else (stack(batch), labels, weights[indices])
        return Noted(whole, unreadable, damaged) if unreadable or damaged else whole

    def try_load(self, key: Key, unreadable: dict[int, str], damaged: dict[int, str]) -> Tensor | None:
        """An image, or None where it turns out to be unreadable, which is noted, and so is damaged data."""
        if self.images.checked:
            return self.load(key, key[1])
        try:
            image, said = Hearing().hear(lambda: self.load(key, key[1]))
        except UnreadableImage as error:
            unreadable[key[1]] = str(error)
            return None
        if said:
            damaged[key[1]] = said
        return image

    def load(self, key: Key, index: int) -> Tensor:
        """An image with the augmentation of a key."""
        image = self.images[index]
        torch.default_generator.manual_seed(derive_seed(self.seed, *key))
        return self.augment(image)


def stand_ins(indices: list[int], unreadable: dict[int, str]) -> list[int]:
    """For each image of a batch the image itself, or the next one of the batch that can be read."""
    readable = [index for index in indices if index not in unreadable]
    if not readable:
        reason = next(iter(unreadable.values()))
        raise InputError(f"none of the {len(indices)} images of a batch can be read ({reason}); mend their shards")
    following, last = [], readable[0]
    for index in reversed(indices):
        last = last if index in unreadable else index
        following.append(last)
    return following[::-1]


class ResizedImages(TorchDataset[Batch]):
    """A batch of images at once, as a model is evaluated on them."""

    def __init__(self, images: Images, preprocess: Preprocess) -> None:
        self.images, self.preprocess = images, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Loaded:
        try:
            batch = [self.preprocess.resize(self.images[index]) for index in indices]
        except InputError as error:
            return error
        return stack(batch), self.images.labels[indices]


class Views(TorchDataset[Batch]):
    """Every image as a model is evaluated on it, then every one augmented, and so on: view v of image i is v · N + i.

    Args:
        images: N of them.
        preprocess: gives the first view.
        augment: gives each of the others; draws from torch's default generator.
        seed: what is drawn follows from it, the view and the image.
        wanted: numbers of the views that there is to be a batch of.
    """

    def __init__(
        self,
        images: Images,
        preprocess: Preprocess,
        augment: Callable[[Tensor], Tensor] | None,
        seed: int,
        wanted: Sequence[int],
    ) -> None:
        self.images, self.preprocess, self.wanted = images, preprocess, wanted
        self.augmented = None if augment is None else AugmentedImages(images, augment, seed)

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitems__(self, numbers: list[int]) -> Loaded:
        state = torch.default_generator.get_state()
        keys = [divmod(number, len(self.images)) for number in numbers]
        try:
            batch = [self.load(view, index) for view, index in keys]
        except InputError as error:
            return error
        finally:
            torch.default_generator.set_state(state)
        return stack(batch), self.images.labels[[index for _, index in keys]]

    def load(self, view: int, index: int) -> Tensor:
        """One view of one image."""
        if self.augmented is None or not view:
            return self.preprocess.resize(self.images[index])
        return self.augmented.load((view, index), index)


def stack(images: list[Tensor]) -> Tensor:
    """Images (C, h, w) as a batch (B, C, h, w) in channels-last memory; collating in a worker makes it shared."""
    batch: Tensor = default_collate([image.permute(1, 2, 0) for image in images])
    return batch.permute(0, 3, 1, 2)


def as_it_is(batch: Any) -> Any:
    """The datasets give whole batches, or an error as a value: raised, it would bring a worker's traceback along."""
    return batch


def ignore_interrupts(_worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the training process alone answers it, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class WorkerLoader(DataLoader[Batch]):
    """torch's loader, quiet, and without its signal handler."""

    def check_worker_number_rationality(self) -> None:
        """How many workers there are was chosen; torch would warn of more than there are cores."""

    def begin(self) -> Iterator[Loaded]:
        """Begin an epoch. Should a worker die, only the wait for its batch shall fail.

        torch also installs a SIGCHLD handler that raises wherever the main thread happens to be, in the middle of an
        optimiser step or of writing a checkpoint; it is put back to what it was.
        """
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
            return iter(self)
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            return iter(self)
        finally:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def guarded(batches: Iterator[Loaded], workers: int, note: Callable[[Noted], None] | None = None) -> Iterator[Batch]:
    """The batches; what went wrong in one of the worker processes is raised here."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # not a RuntimeError where it died after it announced a batch and before it handed it over
            if not workers or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
                raise
            raise InputError(
                f"a loader process died ({error}); most often memory ran out: "
                "use fewer workers, a smaller cache or smaller batches"
            ) from error
        if isinstance(batch, InputError):
            raise batch
        if isinstance(batch, Noted):
            if note is not None:
                note(batch)
            batch = batch.batch
        yield tuple(batch)  # pinning makes lists of tuples


def end_workers(iterator: Iterator[Loaded] | None) -> None:
    """Tell the worker processes of an epoch to end, and wait for them."""
    shut_down = getattr(iterator, "_shutdown_workers", None)  # an iterator without workers has none
    if shut_down is not None:
        shut_down()
