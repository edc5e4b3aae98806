from collections.abc import Callable

import numpy as np
import pytest
import torch
from making import noise, plain
from PIL import Image
from scipy.stats import ks_2samp
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, rand_augment_choices
from torchvision.transforms import v2

from tokenfusion.data.augment import Augment, Box, erased, random_box, resized_crop
from tokenfusion.data.changes import (
    CHANGES,
    RAND_CHANGES,
    jitter_colors,
    rand_augment,
    trivial_augment,
)
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


def test_rand_augments_changes_are_timms() -> None:
    assert list(RAND_CHANGES) == rand_augment_choices("", increasing=True)


GEOMETRIC = ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]
PLAIN = ["Equalize", "Invert", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"]


@pytest.mark.parametrize("name", [name for name in RAND_CHANGES if name not in GEOMETRIC])
@pytest.mark.parametrize("level", [0.0, 3.3, 9.0, 10.0])
def test_a_change_of_colour_is_timms(name: str, level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pictures that Pillow and torchvision make of it, but for the rounding of products."""
    monkeypatch.setattr("timm.data.auto_augment._randomly_negate", lambda value: value)
    image = noise(20, 31)
    given = LEVEL_TO_ARG[name](level, {}) if LEVEL_TO_ARG[name] else ()
    if given == (0,) and name == "PosterizeIncreasing":  # no bits at all: Pillow 13 refuses it, before it was black
        assert not RAND_CHANGES[name][0](image, level / 10).any()
        return
    theirs = NAME_TO_OP[name](Image.fromarray(image.permute(1, 2, 0).numpy()), *given)
    ours = RAND_CHANGES[name][0](image, level / 10)
    difference = (ours.permute(1, 2, 0).int() - torch.from_numpy(np.array(theirs)).int()).abs()
    assert difference.max() <= (0 if name in PLAIN else 1)


def test_a_change_of_geometry_goes_as_far_as_timms() -> None:
    """A dot moves by 0.45 of the side, a slope of 0.3 moves the lowest row by 0.3 of the height, at magnitude 10."""
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image[:, 5, 3] = 255
    moved_right = RAND_CHANGES["TranslateXRel"][0](image, 1.0)
    assert moved_right[0, 5, 21] == 255
    assert (moved_right[:, 0, 0] == torch.tensor([124, 116, 104])).all()
    image = torch.zeros(3, 41, 41, dtype=torch.uint8)
    image[:, 40, 20:] = 255
    row = RAND_CHANGES["ShearX"][0](image, 1.0)[0, 40]
    start = int((row > 200).nonzero()[0])
    assert abs(abs(start - 20) - 12) <= 1
    turned = RAND_CHANGES["Rotate"][0](image, 1.0)
    assert torch.equal(turned, v2.functional.rotate(image, 30, v2.InterpolationMode.BILINEAR, fill=[124, 116, 104]))


def test_rand_augment_makes_two_changes_each_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[float] = []
    replaced = {name: (lambda image, share: (counted.append(share), image)[1], False) for name in RAND_CHANGES}
    monkeypatch.setattr("tokenfusion.data.changes.RAND_CHANGES", replaced)
    torch.manual_seed(0)
    for _ in range(2000):
        rand_augment(noise(2, 2), 9.0)
    shares = np.array(counted)
    assert abs(len(shares) / 2000 - 1.0) < 0.06
    assert abs(np.median(shares) - 0.9) < 0.01
    assert shares.max() <= 1
    assert abs(np.mean((shares > 0.85) & (shares < 0.95)) - 0.683) < 0.05  # one standard deviation


def test_colour_jitter_is_torchvisions_in_its_range() -> None:
    image = noise(6, 6)
    torch.manual_seed(0)
    means = [
        jitter_colors(torch.full((3, 2, 2), 100, dtype=torch.uint8), 0.4).float().mean().item() for _ in range(300)
    ]
    assert 57 <= min(means) < 65
    assert 135 < max(means) <= 141  # of an even gray, brightness alone changes the mean
    assert torch.equal(jitter_colors(image, 0.0), image)


def test_erasing_fills_one_rectangle_with_noise() -> None:
    plain_image = torch.full((3, 60, 50), 7, dtype=torch.uint8)
    torch.manual_seed(0)
    shares, values = [], []
    for _ in range(300):
        result = erased(plain_image)
        changed = (result != 7).any(dim=0)
        rows, columns = changed.any(dim=1).nonzero()[:, 0], changed.any(dim=0).nonzero()[:, 0]
        height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        assert changed.sum() >= 0.95 * height * width
        assert 0.2 < height / width < 5
        shares.append(height * width / 3000)
        values.append(result[:, changed].float().mean(dim=1))
    assert 0.018 < min(shares) < 0.04
    assert 0.3 < max(shares) < 0.36
    assert torch.stack(values).mean(dim=0) == pytest.approx(torch.tensor([124.0, 116.0, 104.0]), abs=4)
    assert (plain_image == 7).all()


@pytest.mark.parametrize("option", ["rand_augment", "color_jitter", "random_erasing"])
def test_a_further_change_comes_after_the_others_and_by_chance(option: str) -> None:
    image = noise(12, 16)
    values = {"rand_augment": 9.0, "color_jitter": 0.4, "random_erasing": 1.0}
    augment = Augment((12, 16), 3, 1.0, 0.0, False, **{option: values[option]})
    torch.manual_seed(3)
    one, other = augment(image), augment(image)
    torch.manual_seed(3)
    assert torch.equal(augment(image), one)
    assert not torch.equal(one, other)
    assert one.shape == (3, 12, 16)
