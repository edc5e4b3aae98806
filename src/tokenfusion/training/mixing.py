"""Soft targets: mixup, CutMix and their choice, by torchvision."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from tokenfusion.recipe import Recipe
from tokenfusion.training.losses import join_weights


class BatchMixing:
    """Mix a batch's images and labels as the recipe says; with both methods, each batch draws one of them.

    Args:
        recipe: gives `mixup` and `cutmix` (arXiv 1710.09412, 1905.04899), and the share of batches that are mixed.
        num_classes: length of a target.
    """

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        self.num_classes = num_classes
        methods: list[v2.Transform] = []
        if recipe.mixup:
            methods.append(v2.MixUp(alpha=recipe.mixup))
        if recipe.cutmix:
            methods.append(v2.CutMix(alpha=recipe.cutmix))
        self.mix = v2.RandomChoice(methods) if methods else None
        self.prob = recipe.mix_prob

    def __call__(self, images: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), labels (B,) or (B, num_classes), weights (B,) to images and targets (see `losses`)."""
        rows = labels.float() if labels.ndim == 2 else F.one_hot(labels, self.num_classes).float()
        targets = join_weights(rows, weights)
        if self.mix and len(images) > 1 and torch.rand(()).item() < self.prob:
            images, targets = self.mix(images, targets)
        return images, targets
