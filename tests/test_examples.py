"""The programs in `examples/` do what they say."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "examples" / "detector.py"
SPEC = importlib.util.spec_from_file_location("detector", PATH)
detector = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(detector)


def test_a_detector_on_cmts_features_learns(tmp_path):
    torch.manual_seed(0)
    seen = [detector.PastedDigits(held_out=False)[0]] * 8
    losses = detector.train(detector.build("cmt_micro"), seen, steps=8, batch_size=1, rate=1e-3)
    assert losses[-1] < losses[0]
    detector.main(tmp_path / "x.json", "cmt_micro", steps=1, batch_size=2, held_out=2)
    found = json.loads((tmp_path / "x.json").read_text())
    assert set(found["after"]) == {"ap50", "recall50", "iou"}


def test_gradients_of_the_boxes_reach_the_stem_of_the_backbone():
    torch.manual_seed(0)
    model = detector.build("cmt_s").train()
    assert [tuple(level.shape[-2:]) for level in model.backbone(torch.zeros(1, 3, 96, 96)).values()] == [
        (12, 12), (6, 6), (3, 3),
    ]  # fmt: skip
    image, target = detector.PastedDigits(held_out=False)[0]
    model([image], [target])["bbox_regression"].backward()
    assert model.backbone.body.model.stem.conv1.weight.grad.abs().max() > 0


def test_digits_stand_where_the_boxes_say_and_held_out_ones_are_others():
    mine, others = (detector.PastedDigits(held_out) for held_out in (False, True))
    assert {digit.numpy().tobytes() for digit in others.digits}.isdisjoint(
        digit.numpy().tobytes() for digit in mine.digits
    )
    for index in range(4):
        image, target = mine[index]
        again, _ = mine[index]
        assert torch.equal(image, again)
        assert image.shape == (3, 96, 96)
        assert 1 <= len(target["boxes"]) == len(target["labels"])
        assert (detector.box_iou(target["boxes"], target["boxes"]).triu(1) == 0).all()
        assert ((target["boxes"] >= 0) & (target["boxes"] <= 96)).all()


def test_average_precision_by_hand():
    def box(*corners):
        return torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)

    truth = {"boxes": box([0, 0, 10, 10], [20, 20, 30, 30]), "labels": torch.tensor([1, 1])}
    found = {  # right, a second box on the same digit, another class, and right
        "boxes": box([0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [20, 20, 30, 29]),
        "labels": torch.tensor([1, 1, 2, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]),
    }
    assert detector.average_precision([(found, truth)], 1) == pytest.approx((1 + 2 / 3) / 2)
    nothing = {"boxes": box(), "labels": torch.tensor([], dtype=torch.int64), "scores": torch.tensor([])}
    assert detector.average_precision([(nothing, truth)], 1) == 0.0
