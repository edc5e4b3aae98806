"""Weights, balanced classes and multi-label losses, each against what it is defined by."""

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from sklearn.utils.class_weight import compute_sample_weight
from timm.loss import BinaryCrossEntropy as TimmBinaryCrossEntropy
from torch import nn

from runs import small_recipe
from tokenfusion import Classifier, InputError
from tokenfusion.data.augment import Augment
from tokenfusion.data.decoded import Images, read_images
from tokenfusion.data.loader import TrainLoader
from tokenfusion.data.open import open_dataset
from tokenfusion.evaluate import evaluate
from tokenfusion.training import start
from tokenfusion.training.distributed.world import Requests
from tokenfusion.training.objective import (
    BatchMixing,
    BinaryCrossEntropy,
    CrossEntropy,
    balance_in_words,
    image_weights,
    join_weights,
    positive_weights,
    split_weights,
)
from tokenfusion.training.setup import Run, Setup
from tokenfusion.training.state import TrainState
from tokenfusion.training.step import train_step

QUIET = Console(quiet=True)
NO_CHANGE = Augment((8, 8), 3, 1.0, 0.0, False)


def digits(indices) -> Images:
    """Some of the digits; their classes are 0 to 9 in turn."""
    return read_images(open_dataset("digits"), indices, max_pixels=64, cache_bytes=2**20)[0]


def uneven() -> Images:
    """Of the classes 0, 1 and 2: 23, 7 and 2 images."""
    images = digits(range(32))
    images.labels = torch.tensor([0] * 23 + [1] * 7 + [2] * 2)
    return images


def order_of(images: Images, epoch: int, start: int = 0, workers: int = 0, balanced: bool = True):
    loader = TrainLoader(images, NO_CHANGE, batch_size=5, seed=1, workers=workers, balanced=balanced)
    loader.order.epoch, loader.order.start = epoch, start
    return [key for batch in loader.order for key in batch]


def test_classes_take_turns_and_so_do_the_images_of_a_class() -> None:
    images = uneven()
    for epoch in range(4):
        keys = order_of(images, epoch)
        assert len(keys) == 30 == len(order_of(images, epoch, balanced=False))
        drawn = [index for _, index, *_ in keys]
        classes = images.labels[drawn].tolist()
        assert Counter(classes) == {0: 10, 1: 10, 2: 10}
        for place in range(0, 30, 3):  # every round has each class once
            assert set(classes[place : place + 3]) == {0, 1, 2}
        times = Counter(drawn)
        assert {times[index] for index in range(30, 32)} == {5}
        assert {times[index] for index in range(23, 30)} == {1, 2}
        assert max(times[index] for index in range(23)) == 1
        assert len(set(keys)) == 30  # what is drawn again is augmented anew


def test_the_order_follows_from_seed_and_epoch() -> None:
    images = uneven()
    assert order_of(images, 3) == order_of(images, 3) != order_of(images, 4)
    assert order_of(images, 3, start=2) == order_of(images, 3)[10:]


def test_an_image_drawn_again_is_augmented_anew_and_the_same_for_any_number_of_workers() -> None:
    images, augment = uneven(), Augment((8, 8), 3, 0.5, 0.5, False)
    epochs = []
    for workers in (0, 2):
        loader = TrainLoader(images, augment, batch_size=15, seed=0, workers=workers, balanced=True)
        epochs.append(list(loader.epoch(1)))
        loader.close()
    for one, other in zip(*epochs, strict=True):
        assert all(map(torch.equal, one, other))
    pixels, labels = (torch.cat(parts) for parts in zip(*epochs[0], strict=True))
    rare = pixels[labels == 2].flatten(1)
    assert len(rare) == 10
    assert len(rare.unique(dim=0)) > 5  # two images; some crops of 8×8 pixels are alike


def test_inverse_frequency_is_scikit_learns_balanced_weight() -> None:
    weights = image_weights(uneven(), small_recipe(balance="loss"))
    assert weights is not None
    expected = compute_sample_weight("balanced", uneven().labels.numpy())
    torch.testing.assert_close(weights, torch.from_numpy(expected).float())
    assert weights.mean().item() == pytest.approx(1)


def test_own_weights_multiply_those_of_the_class_and_have_mean_1() -> None:
    images = uneven()
    assert image_weights(images, small_recipe()) is None
    images.weights = torch.full((32,), 7.0)
    assert image_weights(images, small_recipe()).tolist() == pytest.approx([1.0] * 32)
    images.weights = torch.arange(1.0, 33.0)
    both = image_weights(images, small_recipe(balance="loss"))
    assert (both[0] / both[31]).item() == pytest.approx((1 / 23) / (32 / 2))
    assert both.mean().item() == pytest.approx(1)


def test_positives_weigh_as_much_as_the_others_together() -> None:
    images = uneven()
    images.labels = torch.stack([torch.arange(32) < 4, torch.arange(32) < 24, torch.arange(32) < 32], 1)
    assert positive_weights(images, small_recipe()) is None
    assert positive_weights(images, small_recipe(balance="loss")).tolist() == pytest.approx([28 / 4, 8 / 24, 1 / 32])
    assert image_weights(images, small_recipe(balance="loss")) is None


def step_on(indices: list[int], weights: list[float] | None, **changes) -> dict[str, torch.Tensor]:
    """The weights of a small model without BatchNorm after a step on these digits."""
    recipe = small_recipe(optimizer="adamw", precision="fp32", clip_grad=0.0, drop_path=0.0, **changes)
    images = digits(indices)
    images.weights = None if weights is None else torch.tensor(weights)
    images.weights = image_weights(images, recipe)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 13), nn.Tanh(), nn.Linear(13, 10))
    classifier = replace(Classifier.create("vit_micro", tuple("0123456789"), img_size=(8, 8)), model=model)
    loader = TrainLoader(images, NO_CHANGE, batch_size=len(indices), seed=0, workers=0)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr_scale": 1.0}], lr=1.0)
    state = TrainState(model, optimizer, ema=0.0, keep_best=False)
    setup = Setup(recipe, Run(Path(), QUIET), classifier, loader, BatchMixing(recipe, 10), CrossEntropy(0.1), images)
    train_step(setup, state, next(iter(loader.epoch(0))), Requests())
    return model.state_dict()


def test_weight_2_is_the_image_twice() -> None:
    weighted = step_on([3, 5, 8], [2.0, 1.0, 1.0], warmup_epochs=0.0)
    twice = step_on([3, 3, 5, 8], None, warmup_epochs=0.0)
    once = step_on([3, 5, 8], None, warmup_epochs=0.0)
    for name, tensor in twice.items():
        torch.testing.assert_close(weighted[name], tensor)
    assert any(not torch.allclose(once[name], tensor) for name, tensor in twice.items())


def test_equal_weights_are_no_weights() -> None:
    some, none = step_on([3, 5, 8], [4.0] * 3), step_on([3, 5, 8], None)
    for name, tensor in none.items():
        torch.testing.assert_close(some[name], tensor)


def test_a_mixture_counts_as_its_parts_do() -> None:
    # mixup computes λ × the loss of one image + (1 - λ) × that of the other, each with its own weight
    recipe = small_recipe(mixup=1.0)
    torch.manual_seed(5)
    images = torch.rand(2, 3, 4, 4)
    weights = torch.tensor([0.25, 1.75])
    for labels, loss in (
        (torch.tensor([1, 2]), CrossEntropy(0.1)),
        (torch.tensor([[True, False, True], [False, False, True]]), BinaryCrossEntropy(0.1)),
    ):
        plain = BatchMixing(small_recipe(), 3)(images, labels, weights)[1]
        mixed, targets = BatchMixing(recipe, 3)(images, labels, weights)
        share = ((mixed[0] - images[1]) / (images[0] - images[1])).mean()
        assert 0 < share < 1
        logits = torch.randn(1, 3)
        first, second = (loss(logits, plain[[i]]) for i in (0, 1))
        torch.testing.assert_close(loss(logits, targets[[0]]), share * first + (1 - share) * second)


def test_losses_are_the_libraries_own() -> None:
    torch.manual_seed(0)
    logits, weights = torch.randn(5, 4), torch.rand(5) + 0.5
    labels = torch.tensor([0, 3, 1, 1, 2])
    rows = F.one_hot(labels, 4).float()
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(CrossEntropy(0.1)(logits, rows), expected)
    each = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(CrossEntropy(0.1)(logits, join_weights(rows, weights)), (weights * each).sum())
    several = torch.rand(5, 4) < 0.4
    torch.testing.assert_close(
        BinaryCrossEntropy(0.0)(logits, several.float()) / 5,
        TimmBinaryCrossEntropy(smoothing=0.0)(logits, several.float()),
    )
    # positives 3 times: as if each decision for a positive were there thrice
    each = F.binary_cross_entropy_with_logits(logits, several.float(), reduction="none")
    thrice = (each * torch.where(several, 3.0, 1.0)).mean(1).sum()
    torch.testing.assert_close(BinaryCrossEntropy(0.0, torch.full((4,), 3.0))(logits, several.float()), thrice)


def test_weights_come_back_from_the_rows_they_were_joined_to() -> None:
    targets, weights = torch.rand(3, 4), torch.tensor([0.5, 1.0, 8.0])
    rows, again = split_weights(join_weights(targets, weights), 4)
    torch.testing.assert_close(rows, targets)
    assert torch.equal(again, weights)
    assert split_weights(targets, 4)[1] is None


def test_right_is_argmax_or_every_class() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0], [-1.0, 3.0, 1.0]])
    assert CrossEntropy(0.0).count_right(logits, torch.tensor([[1.0, 0, 0], [0, 0.4, 0.6]])) == 1
    assert BinaryCrossEntropy(0.0).count_right(logits, torch.tensor([[1.0, 1, 0], [0, 1, 0]])) == 1


@pytest.fixture(scope="module")
def rare(tmp_path_factory):
    """Fours and nines, of which one in twelve is left, and how many of the nines a model finds that ignores that."""
    folder, source = tmp_path_factory.mktemp("rare"), open_dataset("digits")
    nines, rows = 0, ["path,label,split"]
    for index, label in enumerate(source.labels.tolist()):
        split = "val" if index % 4 == 0 else "train"
        nines += label == 9
        if label not in (4, 9) or (label == 9 and split == "train" and nines % 12):
            continue
        Image.fromarray(source.decode(index, 64)[0].numpy()).save(folder / f"{index}.png")
        rows.append(f"{index}.png,{label},{split}")
    (folder / "x.csv").write_text("\n".join(rows))
    return folder, recall_of_nines(folder, "none", QUIET)


def recall_of_nines(folder: Path, balance: str, console: Console) -> float:
    changes = {"balance": balance, "model": "wide(vit_micro,0.5)", "epochs": 6, "batch_size": 32}
    start(small_recipe(data=str(folder / "x.csv"), **changes), folder / balance, console)
    return evaluate(folder / balance)["per_class"]["9"]["recall"]


@pytest.mark.parametrize("balance", ["sampling", "loss"])
def test_balance_helps_the_rare_class(balance: str, rare) -> None:
    folder, ignoring_it = rare
    console = Console(file=io.StringIO(), width=200)
    assert recall_of_nines(folder, balance, console) > ignoring_it
    assert console.file.getvalue().count(f"\nbalance={balance}: ") == 1


def test_weights_are_said_with_their_range() -> None:
    images = digits(range(3))
    assert balance_in_words(images, small_recipe()) == []
    images.weights = torch.tensor([2.0, 0.5, 30.0])
    assert balance_in_words(images, small_recipe()) == ["images count by their weights, from 0.5 to 30"]


def test_sampling_of_multi_label_data_is_refused(tmp_path) -> None:
    (tmp_path / "x.csv").write_text("path,labels\na.png,x|y\nb.png,x\n")
    with pytest.raises(InputError, match=r"balance=sampling draws classes in turn.*give --balance loss"):
        start(small_recipe(data=str(tmp_path / "x.csv"), balance="sampling"), tmp_path / "run", QUIET)
