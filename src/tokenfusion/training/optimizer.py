"""What moves the weights: the optimiser, and its learning rate and randomness as functions of the step."""

from math import ceil, cos, pi, sqrt
from typing import Any

import torch
from timm.optim.muon import Muon
from torch import nn

from tokenfusion.data.sampler import mix
from tokenfusion.models.token_fusion import TokenFusion
from tokenfusion.recipe import AUTO, Recipe

DECAY_SHARE = 0.2
"""Length of the final decay of a run with an open end, in units of the epochs before it (arXiv 2405.18392)."""


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Muon (timm's) or AdamW; weight decay on matrices and kernels only; nothing for frozen weights.

    Muon orthogonalises the momentum of a matrix or a flattened kernel and scales it to the root mean square of AdamW's
    updates, so that one learning rate serves both; biases, norms, gates, positions and CLS are left to AdamW.

    Returns:
        The optimiser, with two groups, of decayed weights and of others, for each learning rate; a group's `lr_scale`
        is that rate in units of the recipe's.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    scales = lr_scales(model, recipe)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for scale in dict.fromkeys(scales.values()):
        groups |= {(scale, True): [], (scale, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[scales[name], parameter.ndim > 1 and name not in exempt].append(parameter)
    muon = recipe.optimizer == "muon"
    options: list[dict[str, Any]] = [
        {"params": parameters, "lr_scale": scale, "weight_decay": recipe.weight_decay if decayed else 0.0}
        | ({"use_fallback": True} if muon and not decayed else {})
        for (scale, decayed), parameters in groups.items()
        if parameters
    ]
    return Muon(options, lr=recipe.lr, nesterov=True) if muon else torch.optim.AdamW(options, lr=recipe.lr, fused=True)


def lr_scales(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Each parameter's learning rate in units of the recipe's, by name: one for the backbone (the parents of a fusion
    model), one for the classifier; what fuses learns at the recipe's own."""
    if isinstance(model, TokenFusion):
        scales = {"cnn": recipe.backbone_lr, "vit": recipe.backbone_lr, "fusion": 1.0, "head": recipe.head_lr}
        return {name: scales[model.part_of(name)] for name, _ in model.named_parameters()}
    classifier = getattr(model, "get_classifier", nn.Identity)()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)  # timm's distilled models have two
    head = {parameter for module in heads for parameter in module.parameters()}
    rates = {True: recipe.head_lr, False: recipe.backbone_lr}
    return {name: rates[parameter in head] for name, parameter in model.named_parameters()}


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int, decay_epoch: int = 0) -> float:
    """Linear warm-up from 0 to the peak, for half of the steps at most, then a cosine to 0 at the last step.

    With `epochs` auto the end is not known: the rate stays at its peak until the final decay, which falls by
    1 - sqrt(share of the decay done) (Hägele et al., arXiv 2405.18392).

    Args:
        recipe: gives the peak, the warm-up and the number of epochs.
        step: optimiser steps done before this one.
        steps_per_epoch: optimiser steps in an epoch.
        decay_epoch: epochs done when the final decay began; 0 before.
    """
    if recipe.epochs == AUTO:
        warmup = recipe.warmup_epochs * steps_per_epoch
        rate = recipe.lr * min((step + 1) / (warmup + 1), 1.0)
        if not decay_epoch:
            return rate
        start, end = decay_epoch * steps_per_epoch, last_epoch(decay_epoch) * steps_per_epoch
        return rate * (1 - sqrt((step - start) / (end - start)))
    total = recipe.epochs * steps_per_epoch
    warmup = min(recipe.warmup_epochs * steps_per_epoch, total / 2)
    if step < warmup:
        return recipe.lr * (step + 1) / (warmup + 1)
    return recipe.lr * 0.5 * (1 + cos(pi * (step - warmup) / max(total - warmup, 1)))


def last_epoch(decay_epoch: int) -> int:
    """Epochs that a run with an open end has in all, once its final decay began after `decay_epoch` of them."""
    return decay_epoch + ceil(DECAY_SHARE * decay_epoch)


def seed_step(seed: int, step: int, *rank: int) -> None:
    """Make all that a step draws (mixup, dropout, drop path) follow from (seed, step), however training got there.

    With a rank, each process draws on its own.
    """
    torch.manual_seed(mix(seed, step, *rank))
