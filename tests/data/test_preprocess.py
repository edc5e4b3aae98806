import json

import numpy as np
import pytest
import torch
from making import noise, plain
from PIL import Image
from torchvision.transforms import v2

from tokenfusion.data.preprocess import Preprocess
from tokenfusion.errors import InputError


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

    def recorded(image: torch.Tensor, side: list[int], mode: object, antialias: bool) -> torch.Tensor:
        areas.append(side[0] * side[1])
        return resize(image, side, mode, antialias=antialias)

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
