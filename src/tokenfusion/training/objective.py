"""What training minimises: mixed batches, the loss of their images, and how much images and classes count.

Targets are rows over the classes, of 0 and 1 or mixtures of such; where images have weights, a last column holds them
and the row is multiplied by it. So a mixture of two images weighs, and is labelled, as its parts are together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import Images
from tokenfusion.errors import InputError
from tokenfusion.models.token_fusion import TokenFusion
from tokenfusion.multilabel import mean_average_precision
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
            methods.append(v2.MixUp(alpha=recipe.mixup))
        if recipe.cutmix:
            methods.append(v2.CutMix(alpha=recipe.cutmix))
        self.mix = v2.RandomChoice(methods) if methods else None
        self.prob = recipe.mix_prob

    def __call__(self, images: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), labels (B,) or (B, num_classes), weights (B,) to images and targets ."""
        rows = labels.float() if labels.ndim == 2 else one_hot(labels, self.num_classes)
        targets = join_weights(rows, weights)
        if self.mix and len(images) > 1 and torch.rand(()).item() < self.prob:
            images, targets = self.mix(images, targets)
        return images, targets


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (B,) as float rows (B, num_classes); unlike torch's, without a look at the labels' range."""
    return torch.zeros(len(labels), num_classes, device=labels.device).scatter_(1, labels[:, None], 1.0)


def join_weights(targets: Tensor, weights: Tensor | None) -> Tensor:
    """Targets (B, K) and weights (B,) as rows (B, K + 1): weight × target, and the weight; without weights as given."""
    return targets if weights is None else torch.cat([weights[:, None] * targets, weights[:, None]], 1)


def split_weights(targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """What `join_weights` joined, after any mixing."""
    if targets.shape[1] == num_classes:
        return targets, None
    weights = targets[:, num_classes]
    return targets[:, :num_classes] / weights[:, None], weights


class CrossEntropy:
    """The loss of images that have one class each; judged by accuracy.

    Args:
        label_smoothing: share of the target that is spread over all classes.
    """

    score = "top1"
    """What `metrics.jsonl` calls the score of the held-out images."""
    train_score = "top1"
    """What it calls the running score of training."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum over the images of weight × loss, of logits (B, K) and targets (B, K) or (B, K + 1)."""
        rows, weights = split_weights(targets, logits.shape[1])
        if weights is None:
            return F.cross_entropy(logits, rows, label_smoothing=self.label_smoothing, reduction="sum")
        losses = F.cross_entropy(logits, rows, label_smoothing=self.label_smoothing, reduction="none")
        return (weights * losses).sum()

    def count_right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """How many predictions match the label that weighs most: 0-dimensional, on the logits' device."""
        rows, _ = split_weights(targets, logits.shape[1])
        return (logits.argmax(1) == rows.argmax(1)).sum()

    def judge(self, logits: Tensor, labels: Tensor) -> tuple[float, float]:
        """Mean loss and accuracy of logits (N, K) and labels (N,)."""
        return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


class BinaryCrossEntropy:
    """The loss of images with any number of classes: of each class's sigmoid, the mean over the classes.

    Args:
        label_smoothing: how far targets move from 0 and 1 towards 1/2, as a share.
        positive_weights: (K,), how much an image that has the class counts against one that has not; all 1 if None.
    """

    score, train_score = "map", "exact_match"

    def __init__(self, label_smoothing: float, positive_weights: Tensor | None = None) -> None:
        self.label_smoothing = label_smoothing
        self.positive_weights = positive_weights

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum over the images of weight × loss, of logits (B, K) and targets (B, K) or (B, K + 1)."""
        rows, weights = split_weights(targets, logits.shape[1])
        smooth = rows * (1 - self.label_smoothing) + self.label_smoothing / 2
        positive = None if self.positive_weights is None else self.positive_weights.to(logits.device)
        losses = F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=positive, reduction="none").mean(1)
        return losses.sum() if weights is None else (weights * losses).sum()

    def count_right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """In how many images every class is on the right side of 1/2: 0-dimensional, on the logits' device."""
        rows, _ = split_weights(targets, logits.shape[1])
        return ((logits > 0) == (rows > 0.5)).all(1).sum()

    def judge(self, logits: Tensor, labels: Tensor) -> tuple[float, float]:
        """Mean loss and mAP of logits (N, K) and labels bool (N, K); the mAP is 0 where no image has a class."""
        loss = F.binary_cross_entropy_with_logits(logits, labels.float()).item()
        return loss, mean_average_precision(logits.numpy(), labels.numpy()) or 0.0


Loss = CrossEntropy | BinaryCrossEntropy


def make_loss(images: Images, recipe: Recipe) -> Loss:
    """What is minimised: it depends on whether an image has one class or any number of them."""
    if images.labels.ndim == 2:
        return BinaryCrossEntropy(recipe.label_smoothing, positive_weights(images, recipe))
    return CrossEntropy(recipe.label_smoothing)


class EachSide(nn.Module):
    """A fusion model that is asked three times: for what both sides say, the patches alone and the pixels alone.

    Args:
        model: holds all the weights.
    """

    def __init__(self, model: TokenFusion) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (3, B, K)."""
        return self.model.side_logits(images)


def asked(model: nn.Module, recipe: Recipe) -> nn.Module:
    """What is called for the logits that the loss is of: the model, or each side of it too, with `side_loss`."""
    if not recipe.side_loss:
        return model
    assert isinstance(model, TokenFusion)  # others were refused
    return EachSide(model)


def with_sides(both: Tensor, alone: Sequence[Tensor], weight: float) -> Tensor:
    """The loss of both sides, and the mean loss of either alone by its weight; without sides as it is."""
    return both + weight * torch.stack([*alone]).mean() if alone else both


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
