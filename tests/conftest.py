"""What several tests need: where shared data may lie, a trained run, and the command."""

import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import children  # noqa: F401 - processes of their own are forked from one that has imported everything
from runs import small_recipe, tiny_recipe
from tokenfusion import cli

torch.set_num_threads(1)  # the tests run side by side, one process a core
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so do the processes that they start


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

    from tokenfusion.training import start

    run = tmp_path_factory.mktemp("trained") / "run"
    start(tiny_recipe(epochs=4), run, Console(quiet=True))
    return run


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that names nearly all digits right, for what depends on how sure it is."""
    from rich.console import Console

    from tokenfusion.training import start

    run = tmp_path_factory.mktemp("learned") / "run"
    start(small_recipe(epochs=4), run, Console(quiet=True))
    return run


@pytest.fixture(scope="session")
def exported(learned, tmp_path_factory) -> Path:
    """That run as ONNX."""
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    from tokenfusion.export.artefact import export

    out = tmp_path_factory.mktemp("exported") / "onnx"
    export(learned, out)
    return out


@pytest.fixture(scope="module")
def browser():
    """A real browser without a screen; while it is open, asyncio has a loop that runs."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium on this machine; apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process; gives (exit status, standard output, standard error)."""

    def run(*words, stdin=""):
        monkeypatch.setattr(sys, "argv", ["tokenfusion", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        output, errors = capsys.readouterr()
        assert "Traceback" not in output + errors
        return status, output, errors

    return run


@pytest.fixture
def run(trained, tmp_path):
    """A finished run that may be written into."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def digit(tmp_path):
    """A readable image."""
    path = tmp_path / "a digit.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7), dtype=np.uint8)).save(path)
    return path
