"""What several tests need: where shared data may lie, a trained run, and the command."""

# ruff: noqa: E402
import gc

gc.disable()  # until all is imported, see pytest_collection_finish

import io
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image

import children  # noqa: F401 - processes of their own are forked from one that has imported everything
from runs import TINY_PARENTS, small_recipe, tiny_recipe
from tokenfusion import cli, terminal
from tokenfusion.recipe import Recipe

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
"""Takes a folder's name and what makes it."""

torch.set_num_threads(1)  # the tests run side by side, one process a core
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so do the processes that they start


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with data and golden numbers that is not part of the package."""
    path = Path(os.environ.get("TOKENFUSION_SHARED", Path(__file__).parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip("no shared data: set TOKENFUSION_SHARED to its folder")
    return path


LONG = (
    "test_front_page.py",
    "test_distributed.py",
    "test_re_attention.py",
    "test_resume.py",
    "test_pretrained_stages.py",
)
"""Files with tests of many seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, so that no test process is left with it while the others are done."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    """All packages are imported: the garbage collector need not look through them again and again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever a library or another test has set: bits depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Folders that the first test process to need them makes, and all others of this session read."""
    base = tmp_path_factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, work: Callable[[Path], object]) -> Path:
        done, made = common / f"{name} is made", common / f"for {name}" / name  # so that nothing else lies beside it
        with FileLock(common / f"{name}.lock"):
            if not done.exists():
                made.parent.mkdir(exist_ok=True)
                work(made)
                done.touch()
        return made

    return make


@pytest.fixture(scope="session")
def trained(made_once) -> Path:
    """A finished run; tests that write into it take a copy."""
    return made_once("trained", partial(train_quietly, tiny_recipe(epochs=4)))


@pytest.fixture(scope="session")
def learned(made_once) -> Path:
    """A finished run that names nearly all digits right, for what depends on how sure it is."""
    return made_once("learned", partial(train_quietly, small_recipe(epochs=4)))


def train_quietly(recipe: Recipe, run: Path) -> None:
    from rich.console import Console

    from tokenfusion.training import start

    start(recipe, run, Console(quiet=True))


@pytest.fixture(scope="session")
def exported(learned, made_once) -> Path:
    """That run as ONNX."""
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    from tokenfusion.export.artefact import export

    return made_once("exported", partial(export, learned))


@pytest.fixture(scope="session")
def parent_files(made_once) -> tuple[str, ...]:
    """Generated weights of `TINY_PARENTS`."""
    from safetensors.torch import save_file

    def write(folder: Path) -> None:
        folder.mkdir()
        for seed, name in enumerate(TINY_PARENTS):
            torch.manual_seed(seed)
            save_file(timm.create_model(name).state_dict(), folder / f"{name}.safetensors")

    folder = made_once("weights of parents", write)
    return tuple(str(folder / f"{name}.safetensors") for name in TINY_PARENTS)


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
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a command that is stopped leaves off
        terminal.console.outlives_reader = False
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
