"""How a verb imports what takes seconds."""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def first_import(package: str) -> Iterator[None]:
    """The first import of a package of thousands of modules, without Python looking for garbage meanwhile.

    What is imported stays until the process ends, and is not looked through later either, nor at the end: of a verb
    that answers in seconds that is a quarter. Nothing is done where the package has been imported before.
    """
    if package in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


COMPILER = "torch._dynamo.utils"


def import_timm_alone() -> None:
    """Import timm, and with it torchvision, without PyTorch's compiler, a third of all that `predict` imports.

    torchvision imports it for a function of detectors (0.29, `ops/roi_align.py`), which find it when they call it. Both
    keep it from some functions by `torch.compiler.disable`, of which PyTorch has a form that looks for it when they are
    called. Versions that want more of it get it at once.
    """
    if COMPILER in sys.modules or "timm" in sys.modules:
        return
    import torch

    disable = torch.compiler.disable
    torch.compiler.disable = getattr(torch, "_disable_dynamo", disable)
    stand_in = sys.modules[COMPILER] = LaterCompiler(COMPILER)
    try:
        import torchvision.transforms.v2  # noqa: F401

        stand_in.leave()
        import timm  # noqa: F401
    finally:
        stand_in.leave()
        torch.compiler.disable = disable


class LaterCompiler(ModuleType):
    """In the place of `torch._dynamo.utils`, which is imported when anything else of it is asked for."""

    def is_compile_supported(self, device: Any) -> Any:
        """What torchvision imports."""
        return self.load().is_compile_supported(device)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # by whoever looks through all modules
            raise AttributeError(name)
        return getattr(self.load(), name)

    def load(self) -> ModuleType:
        """The module itself."""
        self.leave()
        return importlib.import_module(COMPILER)

    def leave(self) -> None:
        """Make room for it."""
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
