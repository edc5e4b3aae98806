"""Soft targets: mixup, CutMix and their choice, by torchvision."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from tokenfusion.recipe import Recipe


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
            methods.append(v2.MixUp(alpha=recipe.mixup, num_classes=num_classes))
        if recipe.cutmix:
            methods.append(v2.CutMix(alpha=recipe.cutmix, num_classes=num_classes))
        self.mix = v2.RandomChoice(methods) if methods else None
        self.prob = recipe.mix_prob

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B,) to images and targets (B, num_classes) that sum to 1."""
        if self.mix and len(images) > 1 and torch.rand(()).item() < self.prob:
            mixed, targets = self.mix(images, labels)
            return mixed, targets
        return images, F.one_hot(labels, self.num_classes).float()
