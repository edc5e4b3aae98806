"""The golden values of the official implementations, and the rule that fills a model's weights."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenfusion.models.cmt
import tokenfusion.models.crossvit
import tokenfusion.models.deepvit  # noqa: F401 - registers the models

NAMES = ("crossvit_9_dagger_224", "deepvit_16", "deepvit_s", "deepvit_l", "cmt_ti")
OURS = Path(__file__).parents[1] / "fixtures" / "golden"
"""Those that were read off a copy of the public code which gives the shared values of `deepvit_16`."""


def shared_folder():
    """The folder of shared data; skips the test where there is none."""
    folder = Path(os.environ.get("TOKENFUSION_SHARED", Path(__file__).parents[3] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip("no shared/golden folder: set TOKENFUSION_SHARED to one")
    return folder


def golden(name):
    """The golden values of one model."""
    own = OURS / f"{name}.json"
    return json.loads((own if own.exists() else shared_folder() / "golden" / own.name).read_text())


def filled(key, shape):
    """The tensor that the rule gives an official key."""
    normal = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith("running_var"):
        value = 1 + 0.1 * np.abs(normal)
    elif key.endswith("running_mean"):
        value = 0.1 * normal
    elif "relative_pos" in key and len(shape) >= 2:
        value = 0.5 * normal
    elif ("pos_embed" in key or "cls_token" in key) and len(shape) >= 2:
        value = 0.02 * normal
    elif len(shape) >= 2:
        value = normal / np.sqrt(np.prod(shape[1:]))
    elif key.endswith("weight"):
        value = 1 + 0.1 * normal
    else:
        value = 0.02 * normal
    return torch.from_numpy(np.asarray(value))


def official_state(model):
    """A model's state dict in the official keys, filled by rule; it needs no shared data."""
    return {
        model.official_names.official(key): filled(model.official_names.official(key), tuple(value.shape))
        for key, value in model.state_dict().items()
    }


def golden_images(side):
    """The input the golden values are of, in float64."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, side, side)))
