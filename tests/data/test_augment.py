import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from tokenfusion.data.augment import CHANGES, Augment, Box, random_box, resized_crop, trivial_augment
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.errors import InputError


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def plain(img_size: tuple[int, int], in_chans: int = 3, crop_pct: float = 1.0) -> Preprocess:
    return Preprocess(img_size, in_chans, (0.5,) * in_chans, (0.25,) * in_chans, crop_pct)


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = noise(5, 9)
    assert torch.equal(plain((5, 9)).resize(image), image)


def test_a_wide_image_loses_its_sides() -> None:
    image = torch.zeros(3, 6, 20, dtype=torch.uint8)
    image[:, :, 7:13] = noise(6, 6)
    assert torch.equal(plain((6, 6)).resize(image), image[:, :, 7:13])


def test_a_tall_image_loses_top_and_bottom() -> None:
    image = noise(31, 4)
    assert torch.equal(plain((5, 4)).resize(image), image[:, 13:18])


def test_crop_pct_keeps_the_middle() -> None:
    image = noise(16, 24)
    assert torch.equal(plain((8, 12), crop_pct=0.5).resize(image), image[:, 4:12, 6:18])


@pytest.mark.parametrize(("size", "img_size"), [((40, 60), (12, 18)), ((9, 15), (27, 45)), ((50, 37), (50, 23))])
def test_resizing_agrees_with_pillow(size: tuple[int, int], img_size: tuple[int, int]) -> None:
    image = noise(*size)
    height, width = img_size
    resized = plain(img_size).resize(image).permute(1, 2, 0).numpy().astype(int)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    if size == (50, 37):
        expected = np.asarray(picture.crop((7, 0, 30, 50)))  # (37 - 23) / 2 from either side
    else:
        expected = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    assert abs(resized - expected).max() <= 1


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1)])
def test_a_long_thin_image_takes_no_long_way_round(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    resize, areas = v2.functional.resize, []

    def recorded(image: torch.Tensor, side: list[int], antialias: bool) -> torch.Tensor:
        areas.append(side[0] * side[1])
        return resize(image, side, antialias=antialias)

    monkeypatch.setattr(v2.functional, "resize", recorded)
    image = torch.full((3, *size), 77, dtype=torch.uint8)
    assert (plain((224, 160)).resize(image) == 77).all()
    assert max(areas) <= 4 * 224 * 160  # enlarged first, it would be 1.5 billion


def test_one_channel_is_the_luma_of_three() -> None:
    image = torch.tensor([[[255, 0, 0, 200]], [[0, 255, 0, 200]], [[0, 0, 255, 200]]], dtype=torch.uint8)
    gray = plain((1, 4), in_chans=1).resize(image)
    assert gray.shape == (1, 1, 4)
    assert (gray[0, 0].int() - torch.tensor([76, 150, 29, 200])).abs().max() <= 1  # 0.299 R + 0.587 G + 0.114 B


def test_normalize_by_hand() -> None:
    preprocess = Preprocess((1, 1), 3, (0.5, 0.0, 0.2), (0.25, 1.0, 0.4))
    batch = torch.tensor([[255, 51, 102], [0, 0, 0]], dtype=torch.uint8).view(2, 3, 1, 1)
    normal = preprocess.normalize(batch)
    assert normal.dtype == torch.float32
    expected = [[(1 - 0.5) / 0.25, 0.2, (0.4 - 0.2) / 0.4], [-2.0, 0.0, -0.5]]
    torch.testing.assert_close(normal.view(2, 3), torch.tensor(expected))


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_normalize_in_any_memory_format(in_chans: int, memory_format: torch.memory_format) -> None:
    mean, std = (0.1, 0.2, 0.7)[:in_chans], (0.3, 0.5, 0.2)[:in_chans]
    batch = torch.stack([noise(4, 6), noise(4, 6, 1)])[:, :in_chans].contiguous(memory_format=memory_format)
    before = batch.clone()
    normal = Preprocess((4, 6), in_chans, mean, std).normalize(batch)
    assert torch.equal(batch, before)
    assert normal.is_contiguous(memory_format=memory_format)
    for channel in range(in_chans):
        expected = (batch[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(normal[:, channel].double(), expected, rtol=1e-6, atol=1e-6)


def test_preprocess_travels_as_json() -> None:
    preprocess = Preprocess((96, 128), 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.875)
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


def test_preprocess_from_another_version_is_refused() -> None:
    values = plain((4, 4)).to_dict()
    with pytest.raises(InputError, match=r"unexpected keyword argument 'gamma'.*newer"):
        Preprocess.from_dict({**values, "gamma": 2})
    del values["std"]
    with pytest.raises(InputError, match="std"):
        Preprocess.from_dict(values)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (((4, 4), 2, (0.5,) * 2, (0.5,) * 2), "in_chans=2"),
        (((4, 4), 3, (0.5,), (0.5,) * 3), "one value for each"),
        (((4, 0), 1, (0.5,), (0.5,)), "img_size"),
        (((4, 4), 1, (0.5,), (0.5,), 0.0), "crop_pct=0.0"),
    ],
)
def test_preprocess_refuses_nonsense(fields: tuple, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Preprocess(*fields)


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
    for seed in range(300):
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
        not torch.equal(change.apply(image, change.magnitudes[20] if change.magnitudes else 0.0), image)
        for change in CHANGES
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
