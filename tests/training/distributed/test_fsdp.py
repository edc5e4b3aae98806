"""Checkpoints of which each process writes its part: what is refused."""

import json

import pytest
import torch

from tokenfusion.errors import InputError
from tokenfusion.training.distributed.fsdp import load_shards, read_pointer
from tokenfusion.training.saved import last_good, pointer_of


@pytest.mark.parametrize("folder", ["..", "", ".", "/etc", "last.2", "../state/last.0", "epoch.0", 3])
def test_a_pointer_to_another_folder_is_refused(tmp_path, folder):
    """The folder that it names is removed once there is a newer checkpoint."""
    path = tmp_path / "last.safetensors"
    pointer_of(path).write_text(json.dumps({"folder": folder, "description": {}}))
    with pytest.raises(InputError, match=r"last\.json is damaged: .*; delete the folder"):
        read_pointer(path)


def test_a_pointer_names_one_of_two_folders(tmp_path):
    path = tmp_path / "last.safetensors"
    pointer_of(path).write_text(json.dumps({"folder": "last.1", "description": {"step": 3}}))
    assert read_pointer(path) == (tmp_path / "last.1", {"step": 3}, {})
    assert last_good(path).startswith("the last good checkpoint is kept")


def test_moments_of_a_parameter_that_there_is_not_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "last.safetensors"
    (tmp_path / "last.0").mkdir()
    save_file({"optimizer.7.exp_avg": torch.zeros(3)}, tmp_path / "last.0" / "part.safetensors")
    pointer_of(path).write_text(json.dumps({"folder": "last.0", "description": {}}))
    with pytest.raises(InputError, match=r"last\.json is damaged: list index out of range"):
        load_shards(path, {}, [torch.zeros(3)])
