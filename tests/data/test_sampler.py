from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from making import batches_of

from tokenfusion.data.sampler import (
    OPEN_SHARDS,
    RandomOrder,
    ShardOrder,
    Share,
    choose_order,
    derive_seed,
    shard_order,
)
from tokenfusion.errors import InputError

SHARDS = np.repeat(np.arange(40), np.arange(40) % 7 + 11)
"""Forty shards of 11 to 17 images."""


@pytest.mark.parametrize("batch_size", [1, 6, 24, 50, len(SHARDS)])
def test_an_epoch_has_each_image_once_but_for_less_than_a_batch(batch_size: int) -> None:
    epochs = []
    for epoch in range(3):
        drawn = list(chain(*batches_of(ShardOrder(SHARDS, batch_size, 5), epoch=epoch)))
        assert len(drawn) == len(SHARDS) // batch_size * batch_size
        assert len(set(drawn)) == len(drawn)
        epochs.append(drawn)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batches_of(ShardOrder(SHARDS, batch_size, 6)) != batches_of(ShardOrder(SHARDS, batch_size, 5))
    if len(SHARDS) % batch_size > 9:
        left_out = [set(range(len(SHARDS))) - set(drawn) for drawn in epochs]
        assert left_out[0] != left_out[1]


def test_only_a_few_shards_are_open_at_a_time_and_each_once() -> None:
    order = ShardOrder(SHARDS, 24, 5)
    seen = [set(SHARDS[batch]) for batch in batches_of(order)]
    assert all(OPEN_SHARDS <= len(shards) <= 2 * OPEN_SHARDS for shards in seen)
    stays = {shard: [step for step, shards in enumerate(seen) if shard in shards] for shard in range(40)}
    runs = [1 + int((np.diff(steps) > 1).sum()) for steps in stays.values() if steps]
    assert sum(runs) <= 40 + OPEN_SHARDS - 1  # but for those that two lanes share


@pytest.mark.parametrize(("share", "ahead"), [(Share(), 8), (Share(1, 4), 2)])
def test_shards_are_announced_before_they_are_drawn_from(share: Share, ahead: int) -> None:
    order = ShardOrder(SHARDS, 24, 5)
    announced: list[int] = []
    order.on_coming, order.share = announced.append, share
    drawn: set[int] = set()
    for batch in order:
        drawn |= set(SHARDS[[index for _, index in batch]])
        assert drawn <= set(announced)
        assert len(announced) <= len(drawn) + ahead
    assert sorted(announced) == sorted(drawn)


@pytest.mark.parametrize("start", [1, 7, 22])
def test_any_step_can_be_started_from(start: int) -> None:
    whole = batches_of(ShardOrder(SHARDS, 24, 5), epoch=2)
    assert batches_of(ShardOrder(SHARDS, 24, 5), epoch=2, start=start) == whole[start:]


@pytest.mark.parametrize(("processes", "parts"), [(2, 1), (4, 1), (8, 1), (2, 3), (4, 3)])
def test_processes_share_the_same_batches_without_overlap(processes: int, parts: int) -> None:
    alone = batches_of(ShardOrder(SHARDS, 48, 5), Share(parts=parts))
    shares = [batches_of(ShardOrder(SHARDS, 48, 5), Share(rank, processes, parts)) for rank in range(processes)]
    for step, batch in enumerate(alone):
        assert sorted(chain(*(share[step] for share in shares))) == sorted(batch)
    for share in shares:
        assert max(len(set(SHARDS[batch])) for batch in share) <= 2 * OPEN_SHARDS // processes
    fetched = [set(SHARDS[list(chain(*share))]) for share in shares]
    assert sum(map(len, fetched)) <= 40 + OPEN_SHARDS - 1  # a few lie on the border of two processes


def test_more_processes_than_shards_share_them_by_images() -> None:
    few = np.repeat(np.arange(3), 40)
    shares = [batches_of(ShardOrder(few, 24, 5), Share(rank, 12)) for rank in range(12)]
    drawn = [index for share in shares for batch in share for index in batch]
    assert len(drawn) == len(set(drawn)) == 120


def test_each_batch_takes_the_next_images_of_each_lane() -> None:
    order = shard_order(np.array([0, 1] * 4), 4, 2, torch.Generator().manual_seed(0))
    shards = (order % 2).tolist()  # of two shards of four images, each lane has one
    assert shards in ([0, 0, 1, 1] * 2, [1, 1, 0, 0] * 2)
    assert sorted(order.tolist()) == list(range(8))


def test_seeds_are_mixed_not_added() -> None:
    seeds = {derive_seed(seed, epoch, index) for seed in range(10) for epoch in range(10) for index in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(0, 1) != derive_seed(0, 0, 1)
    flipped = [bin(derive_seed(0, 0, 0) ^ derive_seed(0, 0, 1 << bit)).count("1") for bit in range(40)]
    assert min(flipped) >= 20
    assert max(flipped) <= 44
    derive_seed(2**63 - 1, 0)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_batch_has_each_of_its_images_as_often_as_repeats_say_and_an_epoch_is_as_long(balanced: bool) -> None:
    labels = torch.tensor([0] * 30 + [1] * 90)
    plain, order = (choose_order(labels, None, 16, 5, balanced, repeats) for repeats in (1, 3))
    order.epoch = plain.epoch = 2
    batches, before = list(order), list(plain)
    assert [len(batch) for batch in batches] == [16] * (120 // 16)
    for batch, first in zip(batches, before, strict=True):
        assert [key[:2] for key in batch] == [key[:2] for key in 3 * first[::3]][:16]
        assert len(set(batch)) == 16  # every one is augmented by chances of its own
        assert all(one[1] != other[1] for one, other in pairwise(batch))  # what mixing pairs
    drawn = [key for batch in batches for key in batch]
    assert len({key[1] for key in drawn}) <= -(-16 // 3) * len(batches)


def test_processes_share_repeated_images_as_one_has_them() -> None:
    alone, shares = RandomOrder(64, 12, 5), [RandomOrder(64, 12, 5) for _ in range(2)]
    for rank, order in enumerate(shares):
        order.share = Share(rank, 2)
    for order in (alone, *shares):
        order.repeats = 3
    for whole, *parts in zip(alone, *shares, strict=True):
        assert [*parts[0], *parts[1]] == whole


def test_images_in_shards_are_not_drawn_repeatedly() -> None:
    with pytest.raises(InputError, match=r"repeats=3: images in shards .*; give 1"):
        choose_order(torch.zeros(len(SHARDS)), SHARDS, 24, 5, False, repeats=3)
