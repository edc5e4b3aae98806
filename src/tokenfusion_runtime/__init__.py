"""Predictions of an exported classifier by numpy, Pillow and one engine, without torch.

import tokenfusion_runtime

classifier = tokenfusion_runtime.load("exported")
classifier.predict(["a.jpg", "b.jpg"])
"""

from tokenfusion_runtime.classifier import ExportedClassifier, load
from tokenfusion_runtime.errors import InputError
from tokenfusion_runtime.prediction import Prediction

__all__ = ["ExportedClassifier", "InputError", "Prediction", "load"]
