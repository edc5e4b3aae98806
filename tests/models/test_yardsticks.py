"""The yardsticks of `benchmarks/yardsticks.py` compute what our models do; else a speed would say nothing."""

import importlib.util
from pathlib import Path

import pytest
import torch

import tokenfusion
from tokenfusion.models.crossvit import CrossViT
from tokenfusion.models.deepvit import DeepViT

PATH = Path(__file__).parents[2] / "benchmarks" / "yardsticks.py"
SPEC = importlib.util.spec_from_file_location("yardsticks", PATH)
yardsticks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(yardsticks)

DEEPVIT = {"img_size": 48, "dim": 36, "heads": 3, "depth": 2, "num_classes": 5}
MODELS = {
    "cmt": lambda: tokenfusion.create_model("cmt_micro"),
    "cmt of four stages": lambda: tokenfusion.create_model("cmt_ti", img_size=64, depths=(1, 1, 1, 1), num_classes=5),
    "deepvit": lambda: tokenfusion.create_model("deepvit_micro"),
    "deepvit of linear patches": lambda: DeepViT(**DEEPVIT),
    "deepvit rescaled": lambda: DeepViT(**DEEPVIT, re_attention=1, stem="conv", block="rescaled", mixing_scale=True),
    "crossvit dagger": lambda: tokenfusion.create_model("crossvit_micro"),
    "crossvit of two sizes": lambda: CrossViT(
        img_size=60, large_scale=(14, 15), dims=(24, 40), heads=(3, 5), depths=(1, 2), num_classes=5
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_yardstick_computes_what_our_model_does(build, training):
    torch.manual_seed(0)
    ours = build().double().train(training)
    theirs = yardsticks.yardstick_of(ours)
    images = torch.randn(2, 3, *ours.img_size, dtype=torch.float64)
    logits, expected = theirs(images), ours(images)
    torch.testing.assert_close(logits, expected)
    for output in (logits, expected):
        output.square().sum().backward()
    official = ours.official_names.official
    gradients = {official(key): parameter.grad for key, parameter in ours.named_parameters()}
    for key, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], msg=key)


def test_another_paper_has_no_yardstick():
    with pytest.raises(KeyError):
        yardsticks.yardstick_of(tokenfusion.create_model("vit_micro"))
