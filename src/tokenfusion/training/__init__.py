"""From a recipe to a run folder with a trained model: run -> prepare -> loop -> step, each read top to bottom."""

from tokenfusion.training.loop import Interrupted
from tokenfusion.training.model import build
from tokenfusion.training.progress import Update
from tokenfusion.training.run import resume, start, train

__all__ = ["Interrupted", "Update", "build", "resume", "start", "train"]
