"""Pictures to work on, small and each unlike the others."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Tree = dict[str, np.ndarray]


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """A picture of noise, uint8 (height, width, 3), decided by its number."""

    def make(number: int, height: int = 7, width: int = 11) -> np.ndarray:
        return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)

    return make


@pytest.fixture
def save_tree() -> Callable[[Path, Tree], Path]:
    """Save pictures under their relative paths below a folder, in the format that each path's ending names."""

    def save(root: Path, tree: Tree) -> Path:
        for name, pixels in tree.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
        return root

    return save


@pytest.fixture
def pets(picture: Callable[..., np.ndarray]) -> Tree:
    """Eleven pictures of two classes, of several sizes."""
    cats = {f"cat/{n}.png": picture(n, 5 + n, 9) for n in range(5)}
    dogs = {f"dog/{n}.png": picture(100 + n, 8, 6 + n) for n in range(6)}
    return cats | dogs


@pytest.fixture
def pets_folder(tmp_path: Path, pets: Tree, save_tree: Callable[[Path, Tree], Path]) -> Path:
    return save_tree(tmp_path / "pets", pets)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real images that the package is measured on, where there are any."""
    beside = Path(__file__).parents[3] / "shared"
    data = Path(os.environ.get("TOKENFUSION_SHARED", beside)) / "data"
    if not data.is_dir():
        pytest.skip("no shared data: set TOKENFUSION_SHARED to the folder that holds data/")
    return data
