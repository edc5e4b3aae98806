"""Runs that take seconds, and whether two ended the same."""

import json
import os
import signal
from pathlib import Path

import torch

from tokenfusion.checkpoint import load_tensors
from tokenfusion.recipe import Recipe


def small_recipe(**changes):
    """A run of a few seconds: the digits at their own 8×8 pixels."""
    values = {
        "data": "digits", "model": "tokenfusion_early_micro", "img_size": (8, 8), "epochs": 2, "batch_size": 128,
        "lr": 4e-3, "hflip": 0.0, "crop_scale": 0.6, "ema": 0.9, "drop_path": 0.1,
    }  # fmt: skip
    return Recipe(**values | changes)


TINY = "fuse(wide(resnet_micro,0.1),wide(with(vit_micro,depth=2),0.1),early)"
"""A model with all that a checkpoint may hold, BatchNorm's statistics included; an epoch of digits takes a second."""


TINY_PARENTS = ("test_efficientnet", "test_vit")
"""A CNN and a transformer of timm's, which it tests by."""


def tiny_recipe(**changes):
    """A run of a second or two, for what does not depend on how much is learned."""
    return small_recipe(**{"model": TINY} | changes)


def interrupt_at(step):
    """A `progress` that presses Ctrl-C after so many steps."""
    return after_step(step, lambda: os.kill(os.getpid(), signal.SIGINT))


def after_step(step, act):
    """A `progress` that does something once, after a step counted from 1."""

    def listen(update):
        if update.step == step and update.record is None:
            act()

    return listen


TIMES = {"seconds", "images_per_s", "peak_memory_mb"}


def records_of(run: Path, but=TIMES):
    """Every number but the times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in but} for line in lines]


def results(run: Path, but=TIMES):
    """Every tensor, and every number but the times, that a finished run leaves."""
    tensors, progress = load_tensors(run / "state" / "last.safetensors")
    shipped, _ = load_tensors(run / "model.safetensors")
    return tensors | {f"shipped.{k}": v for k, v in shipped.items()}, records_of(run, but), progress["step"]


def assert_same(one: Path, other: Path, but=frozenset()) -> None:
    """Two runs ended with the same bits and the same numbers, but some of them."""
    tensors, records, step = results(one, TIMES | but)
    expected, expected_records, expected_step = results(other, TIMES | but)
    assert records == expected_records
    assert step == expected_step
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
