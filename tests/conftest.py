"""What several tests need: where shared data may lie, and a trained run."""

import os
from pathlib import Path

import pytest
import torch

from runs import small_recipe

torch.set_num_threads(1)  # the tests run side by side, one process a core


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with data and golden numbers that is not part of the package."""
    path = Path(os.environ.get("TOKENFUSION_SHARED", Path(__file__).parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip("no shared data: set TOKENFUSION_SHARED to its folder")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that write into it take a copy."""
    from rich.console import Console

    from tokenfusion.train import start

    run = tmp_path_factory.mktemp("trained") / "run"
    start(small_recipe(epochs=4), run, Console(quiet=True))
    return run
