"""Blocks that the papers share."""

import timm  # noqa: F401 - first: its import registers our models, which need these layers whole
