"""Blocks that the papers share."""
