"""What a run consists of: `prepare.py` sets it up, the loop and each step use it."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tokenfusion.classifier import Classifier
from tokenfusion.data.decoded import Images
from tokenfusion.data.loader import TrainLoader
from tokenfusion.recipe import Recipe
from tokenfusion.training.distributed.world import World
from tokenfusion.training.objective import BatchMixing, Loss
from tokenfusion.training.saved import CHECKPOINT, START, is_saved
from tokenfusion.training.watch import Watch


@dataclass(frozen=True)
class Run:
    """Where a run writes, whom it tells, and with which processes it trains; `stage` has a checkpoint of its own."""

    folder: Path
    console: Console
    world: World = World()  # noqa: RUF009 - frozen
    stage: str = CHECKPOINT.stem

    @property
    def checkpoint(self) -> Path:
        return (self.folder / CHECKPOINT).with_stem(self.stage)

    def say(self, text: str) -> None:
        """Print a line, unless there is nothing to say."""
        if text:
            self.console.print(text, highlight=False, soft_wrap=True)


def begun(run: Run) -> bool:
    """Whether a run's weights are in its folder."""
    return is_saved(run.checkpoint) or (run.folder / START).exists()


@dataclass(frozen=True)
class Setup:
    """What is trained, on what, by which recipe.

    Attributes:
        recipe: with a number in the place of each `auto` but that of the epochs.
        run: where to write.
        classifier: the model, and how its images are prepared.
        batches: training images.
        mixing, loss: what a step minimises.
        held_out: images that are evaluated and never trained on; a timing (`auto/timing.py`), which evaluates nothing,
            gives its training images.
        watch: what is measured every few epochs.
    """

    recipe: Recipe
    run: Run
    classifier: Classifier
    batches: TrainLoader
    mixing: BatchMixing
    loss: Loss
    held_out: Images
    watch: Watch | None = None
