from collections.abc import Callable

import numpy as np
import pytest
import torch
from making import noise, plain
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from tokenfusion.data.augment import CHANGES, Augment, Box, random_box, resized_crop, trivial_augment
from tokenfusion.errors import InputError


def draw(boxes: int, crop_scale: float, height: int = 60, width: int = 90) -> np.ndarray:
    torch.manual_seed(0)
    return np.array([random_box(height, width, crop_scale) for _ in range(boxes)], dtype=float)


def test_boxes_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(1)
    crop = v2.RandomResizedCrop(8, scale=(0.3, 1.0))
    image = noise(60, 90)
    params = [crop.make_params([image]) for _ in range(4000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params], dtype=float)
    ours = draw(4000, 0.3)
    derived: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda b: b[:, 0] + b[:, 2] / 2,
        lambda b: b[:, 1] + b[:, 3] / 2,
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
    ]
    for quantity in derived:
        assert ks_2samp(quantity(ours), quantity(theirs)).pvalue > 0.001


def test_boxes_keep_to_scale_aspect_and_image() -> None:
    top, left, height, width = draw(2000, 0.35).T
    assert top.min() == left.min() == 0
    assert ((top + height).max(), (left + width).max()) == (60, 90)
    assert (height * width / 5400).min() >= 0.34
    assert 0.72 <= (width / height).min() <= 0.78
    assert 1.28 <= (width / height).max() <= 1.37


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 50)])
def test_an_image_without_room_for_a_box_gives_its_middle(size: tuple[int, int]) -> None:
    params = v2.RandomResizedCrop(8, scale=(0.9, 1.0)).make_params([noise(*size)])
    assert random_box(*size, 0.9) == (params["top"], params["left"], params["height"], params["width"])


@pytest.mark.parametrize("box", [(2, 3, 15, 21), (0, 0, 7, 9), (5, 1, 12, 16), (19, 30, 1, 1)])
def test_crops_are_torchvisions_in_either_memory_format(box: Box) -> None:
    image = noise(20, 31)
    rows = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expected = v2.functional.resized_crop(image, *box, [12, 16], antialias=True)
    assert torch.equal(resized_crop(image, box, (12, 16)), expected)
    assert torch.equal(resized_crop(rows, box, (12, 16)), expected)


def test_trivial_augment_is_torchvisions() -> None:
    theirs = v2.TrivialAugmentWide()
    image = noise(20, 31)
    for seed in range(120):
        torch.manual_seed(seed)
        ours = trivial_augment(image)
        torch.manual_seed(seed)
        assert torch.equal(ours, theirs(image)), seed


def test_augment_crops_flips_and_changes() -> None:
    image = noise(20, 31)
    augment = Augment((12, 16), 3, crop_scale=0.3, hflip=0.5, trivial_augment=True)
    for seed in range(20):
        torch.manual_seed(seed)
        result = augment(image)
        torch.manual_seed(seed)
        expected = resized_crop(image, random_box(20, 31, 0.3), (12, 16))
        if torch.rand(1).item() < 0.5:
            expected = v2.functional.horizontal_flip(expected)
        assert torch.equal(result, v2.TrivialAugmentWide()(expected))


def test_every_change_but_none_changes_something() -> None:
    image = noise(32, 32)
    changed = [
        not torch.equal(apply(image, magnitudes[20] if magnitudes else 0.0), image) for apply, magnitudes, _ in CHANGES
    ]
    # noise spans all of 0 to 255, where autocontrast has nothing to do
    assert changed == [False] + [True] * 11 + [False, True]


def test_without_a_crop_augment_is_the_plain_resize() -> None:
    image = noise(30, 50)
    augment = Augment((16, 16), 3, crop_scale=1.0, hflip=0.0, trivial_augment=False)
    assert torch.equal(augment(image), plain((16, 16)).resize(image))


def test_a_shifted_crop_is_that_of_torchvision() -> None:
    image = noise(9, 12)
    augment = Augment((9, 12), 3, crop_scale=1.0, hflip=0.0, trivial_augment=False, crop_padding=3)
    theirs = v2.RandomCrop((9, 12), padding=3, padding_mode="reflect")
    for seed in range(20):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        assert torch.equal(augment(image), expected)


def test_a_border_wider_than_the_image_is_refused() -> None:
    with pytest.raises(InputError, match=r"crop_padding=9 .* 9×12 pixels; give 1 or so, 8 at most"):
        Augment((9, 12), 3, crop_scale=1.0, hflip=0.0, trivial_augment=False, crop_padding=9)


def test_flips_are_as_frequent_as_asked() -> None:
    image = noise(6, 6)
    torch.manual_seed(0)
    augment = Augment((6, 6), 3, crop_scale=1.0, hflip=0.25, trivial_augment=False)
    results = [augment(image) for _ in range(1000)]
    flips = sum(torch.equal(result, image.flip(-1)) for result in results)
    assert flips + sum(torch.equal(result, image) for result in results) == 1000
    assert 200 <= flips <= 300


def test_gray_comes_after_the_colours_have_changed() -> None:
    image = noise(14, 14)
    colour, gray = (Augment((9, 9), channels, 0.5, 0.5, True) for channels in (3, 1))
    torch.manual_seed(4)
    expected = v2.functional.rgb_to_grayscale(colour(image))
    torch.manual_seed(4)
    assert torch.equal(gray(image), expected)
