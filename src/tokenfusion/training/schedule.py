"""The learning rate as a function of the step, and when training ends: at the recipe's last epoch, when patience ends,
or after the final decay of an open end."""

from math import ceil, cos, pi, sqrt

from tokenfusion.formatting import counted
from tokenfusion.recipe import Recipe, number
from tokenfusion.training.state import Progress

DECAY_SHARE = 0.2
"""Length of the final decay of a run with an open end, in units of the epochs before it (arXiv 2405.18392)."""
PATIENCE = 10
"""Epochs that a run with an open end waits for a better accuracy where the recipe states no patience."""
LATEST_DECAY = 250
"""Epochs after which the final decay of a run with an open end begins even if accuracy still improves."""


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int, decay_epoch: int = 0) -> float:
    """Linear warm-up to the peak, for half of the steps at most, then a cosine to the least, one step after the last.

    Of step t = 0, 1, ..., n - 1 with w steps of warm-up: peak (t + 1) / (w + 1) where t < w, and after that
    least + (peak - least) (1 + cos(π (t - w) / (n - w))) / 2.

    With `epochs` auto the end is not known: the rate stays at its peak until the final decay, which falls by
    1 - sqrt(share of the decay done) (Hägele et al., arXiv 2405.18392).

    Args:
        recipe: gives the peak, the end, the warm-up and the number of epochs.
        step: optimiser steps done before this one.
        steps_per_epoch: optimiser steps in an epoch.
        decay_epoch: epochs done when the final decay began; 0 before.
    """
    peak, least = number(recipe.lr), recipe.min_lr
    if recipe.epochs == "auto":
        warmup = recipe.warmup_epochs * steps_per_epoch
        rate = peak * min((step + 1) / (warmup + 1), 1.0)
        if not decay_epoch:
            return rate
        return least + (rate - least) * (1 - sqrt(share_decayed(step, steps_per_epoch, decay_epoch)))
    total = recipe.epochs * steps_per_epoch
    warmup = min(recipe.warmup_epochs * steps_per_epoch, total / 2)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return least + (peak - least) * 0.5 * (1 + cos(pi * (step - warmup) / max(total - warmup, 1)))


def side_weight(recipe: Recipe, step: int, steps_per_epoch: int, decay_epoch: int = 0) -> float:
    """How much the losses of either side alone count beside that of both: `side_loss` at the start, and then a line to
    0, one step after the last; with `epochs` auto the line begins with the final decay. Arguments as of
    `learning_rate`."""
    if recipe.epochs != "auto":
        share = step / (recipe.epochs * steps_per_epoch)
    else:
        share = share_decayed(step, steps_per_epoch, decay_epoch) if decay_epoch else 0.0
    return recipe.side_loss * (1 - share)


def share_decayed(step: int, steps_per_epoch: int, decay_epoch: int) -> float:
    """How much of the final decay is done before a step; arguments as of `learning_rate`."""
    start, end = decay_epoch * steps_per_epoch, last_epoch(decay_epoch) * steps_per_epoch
    return (step - start) / (end - start)


def last_epoch(decay_epoch: int) -> int:
    """Epochs that a run with an open end has in all, once its final decay began after `decay_epoch` of them."""
    return decay_epoch + ceil(DECAY_SHARE * decay_epoch)


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
    if recipe.epochs != "auto":
        progress.finished = progress.epoch >= recipe.epochs or 0 < recipe.patience <= waited
        if progress.finished and progress.epoch < recipe.epochs:
            return (
                f"stopped early after epoch {progress.epoch} of {recipe.epochs}: no better score for "
                f"{counted(waited, 'epoch')} (patience={recipe.patience}); those of epoch {progress.best_epoch} ship"
            )
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
    if recipe.epochs != "auto":
        return recipe.epochs - progress.epoch
    return (last_epoch(progress.decay_epoch) if progress.decay_epoch else MAX_EPOCHS) - progress.epoch
