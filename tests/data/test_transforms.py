import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tokenfusion.data.transforms import CHANGES, Augment, Preprocess
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
def test_a_long_thin_image_takes_no_long_way_round(size: tuple[int, int]) -> None:
    image = torch.full((3, *size), 77, dtype=torch.uint8)
    assert (plain((224, 160)).resize(image) == 77).all()  # enlarged first, it would have 3.2 billion values


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


def test_normalize_keeps_the_batch_and_the_memory_format() -> None:
    batch = torch.stack([noise(4, 6), noise(4, 6, 1)]).contiguous(memory_format=torch.channels_last)
    before = batch.clone()
    normal = plain((4, 6)).normalize(batch)
    assert torch.equal(batch, before)
    assert normal.is_contiguous(memory_format=torch.channels_last)


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


@pytest.mark.parametrize("trivial_augment", [False, True])
def test_augment_draws_and_gives_what_torchvisions_modules_do(trivial_augment: bool) -> None:
    augment = Augment((12, 16), 3, crop_scale=0.3, hflip=0.5, trivial_augment=trivial_augment)
    steps = [v2.RandomResizedCrop((12, 16), scale=(0.3, 1.0), antialias=True), v2.RandomHorizontalFlip(0.5)]
    modules = v2.Compose([*steps, v2.TrivialAugmentWide()] if trivial_augment else steps)
    image = noise(20, 31)
    for seed in range(300 if trivial_augment else 50):
        torch.manual_seed(seed)
        ours = augment(image)
        torch.manual_seed(seed)
        assert torch.equal(ours, modules(image)), seed


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
