"""tokenfusion: image classifiers that fuse CNN and transformer tokens.

The public names are loaded when they are first used, so that the command's help answers at once. The models are
registered with timm as soon as both packages are imported, in either order.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tokenfusion.errors import InputError
from tokenfusion.recipe import Recipe
from tokenfusion.version import __version__

if TYPE_CHECKING:
    from tokenfusion.analyze.record import record_attention
    from tokenfusion.classifier import Classifier
    from tokenfusion.models import create_model, list_models
    from tokenfusion.models.fuse import fuse
    from tokenfusion.training import train
    from tokenfusion.weights import load_weights, to_official

__all__ = [
    "Classifier",
    "InputError",
    "Recipe",
    "__version__",
    "create_model",
    "fuse",
    "list_models",
    "load_weights",
    "record_attention",
    "to_official",
    "train",
]

HOMES = {
    "Classifier": "tokenfusion.classifier",
    "create_model": "tokenfusion.models",
    "fuse": "tokenfusion.models.fuse",
    "list_models": "tokenfusion.models",
    "load_weights": "tokenfusion.weights",
    "record_attention": "tokenfusion.analyze.record",
    "to_official": "tokenfusion.weights",
    "train": "tokenfusion.training",
}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'tokenfusion' has no attribute {name!r}")


class RegisterAfterTimm(importlib.abc.MetaPathFinder):
    """Imports the models, and so registers them, at the end of the first `import timm`.

    Python's import system has no plainer way to keep both promises: that `timm.create_model` knows the names once this
    package is imported, whichever comes first, and that `tokenfusion --help`, for which importing timm takes seconds
    too long, answers at once. timm itself looks for no plug-ins.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "timm":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                load(module)
                importlib.import_module("tokenfusion.models")

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    importlib.import_module("tokenfusion.models")
else:
    sys.meta_path.insert(0, RegisterAfterTimm())
