"""The papers' models by name: built, listed, counted. Importing this room registers them with timm."""

from tokenfusion.models import controls, fuse, variants  # noqa: F401 - which build expressions
from tokenfusion.models.create import create_model, default_config, list_models, require_known

__all__ = ["create_model", "default_config", "list_models", "require_known"]
