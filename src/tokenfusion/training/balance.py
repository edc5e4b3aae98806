"""How much images and classes count: the data's own weights, and what makes up for classes of unequal size."""

import torch
from torch import Tensor

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import Images
from tokenfusion.errors import InputError
from tokenfusion.recipe import Recipe


def refuse_balance(recipe: Recipe, source: Dataset) -> None:
    """Refuse to draw the classes of multi-label data evenly.

    Raises:
        InputError: it is wanted.
    """
    if recipe.balance == "sampling" and source.multi_label:
        raise InputError(
            "balance=sampling draws classes in turn, but an image of multi-label data belongs to several, so that the "
            "common ones come along with the rare ones; give --balance loss"
        )


def balance_in_words(images: Images, recipe: Recipe) -> list[str]:
    """What makes some training images count for more than others, a line each."""
    lines = []
    if images.weights is not None:
        low, high = images.weights.aminmax()
        lines.append(f"images count by their weights, from {low:g} to {high:g}")
    if recipe.balance == "sampling":
        lines.append("balance=sampling: classes are drawn in turn, the rare ones as often as the common ones")
    if recipe.balance == "loss":
        lines.append("balance=loss: the rarer a class, the more its images count")
    return lines


def image_weights(images: Images, recipe: Recipe) -> Tensor | None:
    """How much each image's loss counts: its own weight, times its class's with `balance=loss`.

    A class's weight is N / (K × n) of n in N images and K classes, as scikit-learn's `class_weight="balanced"` has it:
    unlike the effective number of samples (arXiv 1901.05555) it needs no constant to be chosen.

    Args:
        images: what is trained on.
        recipe: gives `balance`.

    Returns:
        (N,) of mean 1, so that the learning rate means the same; None where all images count the same.
    """
    weights = [] if images.weights is None else [images.weights.double()]
    if recipe.balance == "loss" and images.labels.ndim == 1:
        counts = images.labels.bincount()
        weights.append(len(images) / ((counts > 0).sum() * counts[images.labels].double()))
    if not weights:
        return None
    product = torch.stack(weights).prod(0)
    return (product / product.mean()).float()


def positive_weights(images: Images, recipe: Recipe) -> Tensor | None:
    """How much an image that has a class counts against one that has not, with `balance=loss` on multi-label data.

    A class is a problem of its own there, in which the n images that have it count as much as the N - n others.

    Returns:
        (K,), (N - n) / n, at least 1 / n; None where all count the same.
    """
    if recipe.balance != "loss" or images.labels.ndim == 1:
        return None
    counts = images.labels.sum(0).float()
    return (len(images) - counts).clamp(min=1) / counts
