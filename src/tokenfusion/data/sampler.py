"""The order of an epoch: a function of the seed and the epoch, cut into batches and into the shares of processes."""

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from tokenfusion.errors import InputError

OPEN_SHARDS = 8
"""Shards that training draws from at the same time, where there are so many."""

Key = tuple[int, ...]
"""Epoch, and index of an image; where the image was drawn before in that epoch, how often."""


def choose_order(
    labels: Tensor, shards: np.ndarray | None, batch_size: int, seed: int, balanced: bool, repeats: int = 1
) -> "RandomOrder":
    """The order that suits where the images lie.

    Args:
        labels: of each image (N,) or (N, K).
        shards: int64 (N,), the shard of each image; None where they can be had in any order at the same cost.
        batch_size, seed, balanced, repeats: as in TrainLoader.

    Raises:
        InputError: classes are to be drawn evenly from shards, or images repeatedly.
    """
    if shards is None:
        order = BalancedOrder(labels, batch_size, seed) if balanced else RandomOrder(len(labels), batch_size, seed)
        order.repeats = repeats
        return order
    if repeats > 1:
        raise InputError(
            f"repeats={repeats}: images in shards come a few shards at a time, and are drawn once an epoch; give 1"
        )
    if balanced:
        raise InputError(
            "images in shards come a few shards at a time, so that classes cannot be drawn evenly; balance the loss"
        )
    return ShardOrder(shards, batch_size, seed)


class RandomOrder(Sampler[list[Key]]):
    """The keys of each batch of an epoch; `epoch` and `start` are set before it is iterated over.

    With `repeats`, a batch has its images that often, each time augmented anew, and an epoch is as long as without: it
    draws only a part of the images (repeated augmentation, Hoffer et al., arXiv 1901.09335; Berman et al., 1902.05509).
    """

    def __init__(self, images: int, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.steps = images // batch_size
        self.epoch = self.start = 0
        self.repeats = 1
        self.share = Share()

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        keys = self.keys(torch.Generator().manual_seed(derive_seed(self.seed, self.epoch)))
        for step in range(self.start, self.steps):
            yield self.share.take(self.repeated(keys[step * self.batch_size : (step + 1) * self.batch_size]))

    def repeated(self, batch: list[Key]) -> list[Key]:
        """Of a batch's keys one in `repeats`, that often: first all of them, then all again, so that mixing, which
        pairs neighbours, pairs different images."""
        if self.repeats == 1:
            return batch
        drawn = batch[:: self.repeats]
        keys: list[Key] = []
        for number in range(self.repeats):
            for epoch, index, *before in drawn:
                nth = self.repeats * sum(before) + number
                keys.append((epoch, index, nth) if nth else (epoch, index))
        return keys[: len(batch)]

    def keys(self, generator: torch.Generator) -> list[Key]:
        """All the epoch's keys: every image once."""
        return [(self.epoch, index) for index in torch.randperm(self.images, generator=generator).tolist()]


class BalancedOrder(RandomOrder):
    """As many batches as RandomOrder, in which the classes take turns.

    In an epoch no class is drawn more than once more than another, and no image of a class more than once more than
    another of that class. What is drawn again is augmented anew.

    Args:
        labels: int64 (N,).
        batch_size, seed: as in TrainLoader.
    """

    def __init__(self, labels: Tensor, batch_size: int, seed: int) -> None:
        super().__init__(len(labels), batch_size, seed)
        self.members = [torch.nonzero(labels == label)[:, 0] for label in torch.unique(labels)]

    def keys(self, generator: torch.Generator) -> list[Key]:
        draws = self.steps * self.batch_size
        turns = rounds(torch.arange(len(self.members)), draws, generator)
        keys: list[Key] = [()] * draws
        for number, members in enumerate(self.members):
            places = torch.nonzero(turns == number)[:, 0].tolist()
            for nth, (place, index) in enumerate(
                zip(places, rounds(members, len(places), generator).tolist(), strict=True)
            ):
                again = nth // len(members)
                keys[place] = (self.epoch, index, again) if again else (self.epoch, index)
        return keys


def rounds(items: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many of the items: all of them in random order, again and again, the last time in part."""
    orders = [items[torch.randperm(len(items), generator=generator)] for _ in range(-(-count // len(items)))]
    return torch.cat([items[:0], *orders])[:count]


class ShardOrder(RandomOrder):
    """Every image once an epoch, drawn from a few shards at a time; see `shard_order`.

    The number of lanes is a multiple of the number of processes, so that each has lanes of its own; as long as
    OPEN_SHARDS is one too, the batches are the same for any number of processes.

    Args:
        shards: int64 (N,), the shard of each image.
        batch_size, seed: as in TrainLoader.
    """

    def __init__(self, shards: np.ndarray, batch_size: int, seed: int) -> None:
        super().__init__(len(shards), batch_size, seed)
        self.shards = shards
        self.on_coming: Callable[[int], None] = lambda _: None

    def __iter__(self) -> Iterator[list[Key]]:
        """The batches; `on_coming` is told of each shard before it is drawn from, of as many as are open at once."""
        batches = list(super().__iter__())
        news = first_uses([self.shards[[key[1] for key in batch]] for batch in batches])
        coming = iter([shard for shards in news for shard in shards])
        ahead = max(OPEN_SHARDS // self.share.processes, 1)
        for batch, shards in zip(batches, news, strict=True):
            for shard in islice(coming, len(shards) + ahead):
                self.on_coming(shard)
            ahead = 0
            yield batch

    def keys(self, generator: torch.Generator) -> list[Key]:
        lanes = -(-OPEN_SHARDS // self.share.processes) * self.share.processes
        parts = self.share.parts if self.batch_size % self.share.parts == 0 else 1
        order = shard_order(self.shards, self.batch_size // parts, lanes, generator)
        return [(self.epoch, index) for index in order.tolist()]


def first_uses(batches: list[np.ndarray]) -> list[list[int]]:
    """For each batch those of its shards that no batch before it has."""
    seen: set[int] = set()
    news = []
    for shards in batches:
        news.append([shard for shard in dict.fromkeys(shards.tolist()) if shard not in seen])
        seen.update(news[-1])
    return news


def shard_order(shards: np.ndarray, batch_size: int, lanes: int, generator: torch.Generator) -> Tensor:
    """Draw the images of whole batches from several shards at a time.

    Shards come in random order, and the images of each are shuffled. That one long row is cut into lanes of equal
    length, and every batch takes the next images of each lane: the first lane's first, then the second's. So each
    image comes once, as many shards are open as there are lanes (where a lane goes on to its next one, both), and a
    slice of the batches that takes whole lanes needs those lanes' shards alone. What is left over, less than a batch,
    is other images in every epoch.

    Args:
        shards: int64 (N,), the shard of each image.
        batch_size: images per batch.
        lanes: shards that are drawn from at the same time.
        generator: decides the order.

    Returns:
        int64 (N // batch_size * batch_size,), indices of images, a batch behind another.
    """
    images = torch.randperm(len(shards), generator=generator).numpy()
    _, numbers = np.unique(shards, return_inverse=True)
    places = torch.randperm(int(numbers.max()) + 1, generator=generator).numpy()
    row = images[np.argsort(places[numbers[images]], kind="stable")]

    steps = len(shards) // batch_size
    bounds = np.arange(lanes + 1) * batch_size // lanes  # of the lanes in a batch; times steps, in the row
    pieces = [
        row[steps * low : steps * high].reshape(steps, -1) for low, high in pairwise(bounds.tolist()) if high > low
    ]
    return torch.from_numpy(np.concatenate(pieces, axis=1).reshape(-1))


@dataclass(frozen=True)
class Share:
    """Which images of a batch one of several processes loads: its slice of each part that the batch is computed in.

    torchvision's MixUp and CutMix pair each image with the one before it. Where batches are mixed, a process therefore
    loads the image before each of its slices as well, mixes, and drops it: every image is mixed as in one process.

    Attributes:
        rank: of this process.
        processes: that share each batch.
        parts: equal parts that a batch is computed in.
        before: whether the image before each slice is loaded too.
    """

    rank: int = 0
    processes: int = 1
    parts: int = 1
    before: bool = False

    def require_even(self, batch_size: int) -> None:
        """Refuse batches that do not divide.

        Raises:
            InputError: with the nearest size that does.
        """
        slices = self.processes * self.parts
        if self.processes > 1 and batch_size % slices:
            raise InputError(
                f"batches of {batch_size} images do not divide among {self.processes} processes with "
                f"accumulate={self.parts}; give --batch-size {batch_size // slices * slices or slices}, "
                "or start other processes"
            )

    def take(self, batch: list[Key]) -> list[Key]:
        """The share of a batch's keys."""
        if self.processes == 1:
            return batch
        size = len(batch) // (self.parts * self.processes)
        starts = [(part * self.processes + self.rank) * size for part in range(self.parts)]
        return [batch[start + i] for start in starts for i in range(-int(self.before), size)]  # -1 is the batch's last

    def drop_before(self, rows: Tensor) -> Tensor:
        """Of what was loaded, or computed from it, the rows of this process's own images."""
        if self.processes == 1 or not self.before:
            return rows
        return rows.view(self.parts, -1, *rows.shape[1:])[:, 1:].flatten(0, 1)


def derive_seed(*numbers: int) -> int:
    """A seed of 63 bits in which every bit of every number counts; neighbouring numbers give unrelated seeds."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
