"""What moves the weights: the optimiser, its groups of parameters, and what a step draws at random."""

from typing import Any

import torch
from timm.models import group_parameters
from torch import nn

from tokenfusion.data.sampler import derive_seed
from tokenfusion.models.fused_model import FusedModel
from tokenfusion.recipe import Recipe, number
from tokenfusion.training.muon import Muon


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Muon or AdamW; weight decay on matrices and kernels only; nothing for frozen weights.

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
    lr = number(recipe.lr)
    return Muon(options, lr=lr) if muon else torch.optim.AdamW(options, lr=lr, fused=True)


def lr_scales(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Each parameter's learning rate in units of the recipe's, by name: one for the backbone (the parents of a fusion
    model), smaller by `layer_decay` with each layer that is between it and the classifier, one for the classifier; what
    fuses learns at the recipe's own."""
    scales = part_scales(model, recipe)
    if recipe.layer_decay == 1:
        return scales
    behind = layers_behind(model)
    return {name: scale * recipe.layer_decay ** behind[name] for name, scale in scales.items()}


def layers_behind(model: nn.Module) -> dict[str, int]:
    """How many layers each parameter, by its name, has between it and the classifier, as timm groups them."""
    if isinstance(model, FusedModel):
        return {name: model.layers_behind(name) for name, _ in model.named_parameters()}
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    last = max(layers.values())
    return {name: last - layers[name] for name, _ in model.named_parameters()}


def part_scales(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """As `lr_scales`, the same for all layers of a part."""
    if isinstance(model, FusedModel):
        scales = {"cnn": recipe.backbone_lr, "vit": recipe.backbone_lr, "fusion": 1.0, "head": recipe.head_lr}
        return {name: scales[model.part_of(name)] for name, _ in model.named_parameters()}
    classifier = getattr(model, "get_classifier", nn.Identity)()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)  # timm's distilled models have two
    head = {parameter for module in heads for parameter in module.parameters()}
    rates = {True: recipe.head_lr, False: recipe.backbone_lr}
    return {name: rates[parameter in head] for name, parameter in model.named_parameters()}


def seed_step(seed: int, step: int, *rank: int) -> None:
    """Make all that a step draws (mixup, dropout, drop path) follow from (seed, step), however training got there.

    With a rank, each process draws on its own.
    """
    torch.manual_seed(derive_seed(seed, step, *rank))
