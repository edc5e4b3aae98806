"""What moves the weights: the optimiser, and its learning rate and randomness as functions of the step."""

from math import cos, pi
from typing import Any

import torch
from timm.optim.muon import Muon
from torch import nn

from tokenfusion.data.loader import mix
from tokenfusion.recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Muon (timm's) or AdamW; weight decay on matrices and kernels only.

    Muon orthogonalises the momentum of a matrix or a flattened kernel and scales it to the root mean square of AdamW's
    updates, so that one learning rate serves both; biases, norms, gates, positions and CLS are left to AdamW.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim <= 1 or name in exempt else matrices).append(parameter)
    decayed: dict[str, Any] = {"params": matrices, "weight_decay": recipe.weight_decay}
    free: dict[str, Any] = {"params": others, "weight_decay": 0.0}
    if recipe.optimizer == "muon":
        return Muon([decayed, free | {"use_fallback": True}], lr=recipe.lr, nesterov=True)
    return torch.optim.AdamW([decayed, free], lr=recipe.lr, fused=True)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up from 0 to the peak, for half of the steps at most, then a cosine to 0 at the last step.

    Args:
        recipe: gives the peak, the warm-up and the number of epochs.
        step: optimiser steps done before this one.
        steps_per_epoch: optimiser steps in an epoch.
    """
    total = recipe.epochs * steps_per_epoch
    warmup = min(recipe.warmup_epochs * steps_per_epoch, total / 2)
    if step < warmup:
        return recipe.lr * (step + 1) / (warmup + 1)
    return recipe.lr * 0.5 * (1 + cos(pi * (step - warmup) / max(total - warmup, 1)))


def seed_step(seed: int, step: int) -> None:
    """Make all that a step draws (mixup, dropout, drop path) follow from (seed, step), however training got there."""
    torch.manual_seed(mix(seed, step))
