"""When training ends: at the recipe's last epoch, when patience ends, or after the final decay of an open end."""

from tokenfusion.recipe import AUTO, Recipe
from tokenfusion.training.optimizer import last_epoch
from tokenfusion.training.state import Progress

PATIENCE = 10
"""Epochs that a run with an open end waits for a better accuracy where the recipe states no patience."""
LATEST_DECAY = 250
"""Epochs after which the final decay of a run with an open end begins even if accuracy still improves."""
MAX_EPOCHS = last_epoch(LATEST_DECAY)
"""Epochs that a run with an open end has at most."""


def decide_end(recipe: Recipe, progress: Progress) -> str:
    """After an epoch, note whether it was the last, or with `epochs` auto, whether the final decay begins.

    Args:
        recipe: gives the epochs and the patience.
        progress: changed in place: `finished` and `decay_epoch`.

    Returns:
        What there is to say about it, or "".
    """
    waited = progress.epoch - progress.best_epoch
    if recipe.epochs != AUTO:
        progress.finished = progress.epoch == recipe.epochs or 0 < recipe.patience <= waited
        return ""
    if progress.decay_epoch:
        progress.finished = progress.epoch == last_epoch(progress.decay_epoch)
        return ""
    patience = recipe.patience or PATIENCE
    waited = min(waited, progress.epoch - int(recipe.warmup_epochs))  # nothing is expected of the warm-up
    if waited < patience and progress.epoch < LATEST_DECAY:
        return ""
    progress.decay_epoch = progress.epoch
    why = f"no better accuracy for {patience} epochs" if waited >= patience else f"{LATEST_DECAY} epochs are enough"
    return f"{why}: the learning rate falls to 0 until epoch {last_epoch(progress.epoch)}"


def epochs_ahead(recipe: Recipe, progress: Progress) -> int:
    """Epochs still to come, at most."""
    if recipe.epochs != AUTO:
        return recipe.epochs - progress.epoch
    return (last_epoch(progress.decay_epoch) if progress.decay_epoch else MAX_EPOCHS) - progress.epoch
