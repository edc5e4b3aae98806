"""Predictions of an exported classifier: numpy, Pillow and one engine, without torch."""
