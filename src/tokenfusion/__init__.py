"""tokenfusion: image classifiers that fuse CNN and transformer tokens.

The public names are loaded when they are first used, so that `import tokenfusion` costs nothing; asking for any of
the models' names also registers them with timm.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tokenfusion.errors import InputError
from tokenfusion.recipe import Recipe
from tokenfusion.version import __version__

if TYPE_CHECKING:
    from tokenfusion.classifier import Classifier
    from tokenfusion.models import create_model, list_models

__all__ = ["Classifier", "InputError", "Recipe", "__version__", "create_model", "list_models"]

HOMES = {
    "Classifier": "tokenfusion.classifier",
    "create_model": "tokenfusion.models",
    "list_models": "tokenfusion.models",
}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'tokenfusion' has no attribute {name!r}")
