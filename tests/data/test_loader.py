import os
import signal
import warnings
from pathlib import Path

import pytest
import torch

from tokenfusion.data.augment import Augment
from tokenfusion.data.decoded import Images, read_images
from tokenfusion.data.loader import Batch, TrainLoader, eval_batches
from tokenfusion.data.open import open_dataset
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.errors import InputError

AUGMENT = Augment((9, 11), 3, crop_scale=0.4, hflip=0.5, trivial_augment=True)
LEAVE = Augment((8, 8), 3, crop_scale=1.0, hflip=0.0, trivial_augment=False)
PREPROCESS = Preprocess((9, 11), 1, (0.5,), (0.5,))


@pytest.fixture(scope="module")
def digits() -> Images:
    return read_images(open_dataset("digits"), range(100), max_pixels=64, cache_bytes=10**6)[0]


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def batches(
    images: Images, epoch: int, start: int = 0, *, seed: int = 7, workers: int = 0, augment: Augment = AUGMENT
) -> list[Batch]:
    loader = TrainLoader(images, augment, batch_size=16, seed=seed, workers=workers)
    try:
        return list(loader.epoch(epoch, start))
    finally:
        loader.close()


@pytest.mark.parametrize(("workers", "start"), [(1, 0), (3, 4)])
def test_batches_do_not_depend_on_workers_or_start(workers: int, start: int, digits: Images) -> None:
    torch.manual_seed(1)
    expected = batches(digits, epoch=3)[start:]
    torch.manual_seed(2)
    got = batches(digits, epoch=3, start=start, workers=workers)
    assert len(got) == len(expected) == 6 - start
    assert all(map(same, got, expected))


def test_images_that_are_decoded_anew_give_the_same_batches(pets_folder: Path) -> None:
    source = open_dataset(pets_folder)
    cached, decoded = (read_images(source, range(11), max_pixels=999, cache_bytes=n)[0] for n in (10**6, 0))
    assert cached.cached
    assert not decoded.cached
    for workers in (0, 2):
        assert all(map(same, batches(cached, 5), batches(decoded, 5, workers=workers)))


def test_workers_live_on_and_epochs_may_be_left_early(digits: Images) -> None:
    loader = TrainLoader(digits, AUGMENT, batch_size=16, seed=7, workers=2)
    first = next(loader.epoch(0))
    workers = [worker.pid for worker in loader.iterator._workers]  # type: ignore[union-attr]
    assert same(first, batches(digits, 0)[0])
    assert all(map(same, loader.epoch(1, 2), batches(digits, 1)[2:]))
    assert workers == [worker.pid for worker in loader.iterator._workers]  # type: ignore[union-attr]
    loader.close()
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_epoch_has_each_image_at_most_once_in_another_order_each_time(digits: Images) -> None:
    orders = []
    for epoch in range(2):
        seen = torch.cat([images for images, _ in batches(digits, epoch, augment=LEAVE)])
        orders.append([next(i for i in range(100) if torch.equal(digits[i], image)) for image in seen])
        assert len(set(orders[-1])) == 96
    assert orders[0] != orders[1]


def test_labels_belong_to_their_images(digits: Images) -> None:
    for images, labels in batches(digits, 2, augment=LEAVE):
        for image, label in zip(images, labels, strict=True):
            index = next(i for i in range(100) if torch.equal(digits[i], image))
            assert digits.labels[index] == label
        assert images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64


def test_seed_epoch_and_image_each_change_the_augmentation(digits: Images) -> None:
    def first(seed: int, epoch: int) -> torch.Tensor:
        return batches(digits, epoch, seed=seed)[0][0]

    assert not torch.equal(first(0, 0), first(1, 0))
    assert not torch.equal(first(0, 0), first(0, 1))
    assert not torch.equal(first(0, 1), first(1, 0))  # as they would be, were seed and epoch added up
    twice = Images(digits.dataset.subset([0, 0]), 64)  # two copies of one image
    one, other = batches(twice, 0)[0][0]
    assert not torch.equal(one, other)


def test_the_callers_randomness_is_left_as_it_was(digits: Images) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loader = TrainLoader(digits, AUGMENT, batch_size=16, seed=7, workers=0)
    for _ in loader.epoch(0):
        assert torch.equal(torch.get_rng_state(), before)
    batches(digits, 1, workers=1)
    list(eval_batches(digits, PREPROCESS, batch_size=30))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("batch_size", "steps", "size"), [(16, 6, 16), (100, 1, 100), (128, 1, 100), (51, 1, 51)])
def test_steps_per_epoch(batch_size: int, steps: int, size: int, digits: Images) -> None:
    loader = TrainLoader(digits, AUGMENT, batch_size=batch_size, seed=0, workers=0)
    assert loader.steps_per_epoch == steps
    assert [len(labels) for _, labels in loader.epoch(0)] == [size] * steps


def test_no_images_are_refused(digits: Images) -> None:
    nothing = Images(digits.dataset.subset([]), 64)
    with pytest.raises(InputError, match="no readable image"):
        TrainLoader(nothing, AUGMENT, batch_size=4, seed=0, workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_in_order(workers: int, digits: Images) -> None:
    got = list(eval_batches(digits, PREPROCESS, batch_size=30, workers=workers))
    assert [len(labels) for _, labels in got] == [30, 30, 30, 10]
    assert torch.equal(torch.cat([labels for _, labels in got]), digits.labels)
    expected = torch.stack([PREPROCESS.resize(digits[index]) for index in range(100)])
    assert torch.equal(torch.cat([images for images, _ in got]), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_vanishes_is_named_without_a_traceback(workers: int, pets_folder: Path) -> None:
    images, _ = read_images(open_dataset(pets_folder), range(11), max_pixels=999, cache_bytes=0)
    (pets_folder / "dog/2.png").unlink()
    loader = TrainLoader(images, AUGMENT, batch_size=11, seed=0, workers=workers)
    for batches in (loader.epoch(0), eval_batches(images, PREPROCESS, batch_size=4, workers=workers)):
        with pytest.raises(InputError, match=r"^dog/2.png: the file cannot be read") as caught:
            list(batches)
        assert "Traceback" not in str(caught.value)
    loader.close()


class Ends(Augment):
    """Kills its own worker process at the third image, as running out of memory would."""

    def __init__(self) -> None:
        super().__init__((8, 8), 3, 1.0, 0.0, False)
        self.calls, self.home = 0, os.getpid()

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3 and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(image)


def test_a_worker_that_dies_ends_in_a_clear_error(digits: Images) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    loader = TrainLoader(digits, Ends(), batch_size=16, seed=0, workers=2)
    with pytest.raises(InputError, match=r"a loader process died .*use fewer workers"):
        list(loader.epoch(0))
    loader.close()
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert "torch" not in str(getattr(handler, "__module__", ""))  # whose handler raises in the middle of any step


class Vanishes(Preprocess):
    """Fails as reading a file that is gone does."""

    def resize(self, _image: torch.Tensor) -> torch.Tensor:
        raise FileNotFoundError("gone")


def test_an_error_of_this_process_is_no_worker_that_died(digits: Images) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        list(eval_batches(digits, Vanishes((8, 8), 1, (0.5,), (0.5,)), batch_size=4))


class Listens(Preprocess):
    """Gives, in the place of pixels, whether Ctrl-C is ignored, and whether SIGTERM ends this process."""

    def resize(self, _image: torch.Tensor) -> torch.Tensor:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        ends = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        return torch.tensor([ignored, ends]).reshape(2, 1, 1)


def test_workers_leave_ctrl_c_to_the_training_process_while_evaluating_too(digits: Images) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        images, _ = next(eval_batches(digits, Listens((8, 8), 1, (0.5,), (0.5,)), batch_size=4, workers=1))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert images.all()


def test_more_workers_than_cores_are_no_reason_to_warn(digits: Images) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = TrainLoader(digits, LEAVE, batch_size=50, seed=0, workers=3 * (os.cpu_count() or 1))
        next(iter(eval_batches(digits, PREPROCESS, batch_size=50)))
    assert loader.steps_per_epoch == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_are_the_same(workers: int, digits: Images) -> None:
    loader = TrainLoader(digits, AUGMENT, batch_size=16, seed=7, workers=workers)
    pinned = list(loader.epoch(0))
    loader.close()
    assert all(part.is_pinned() for batch in pinned for part in batch)
    assert all(batch[0].is_contiguous(memory_format=torch.channels_last) for batch in pinned)
    dataset = loader.loader.dataset
    assert all(map(same, pinned, (dataset.__getitems__(keys) for keys in loader.order)))  # none of which is pinned
