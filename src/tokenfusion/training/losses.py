"""What training minimises, and how it is judged: one class an image, or any number of them.

Targets are rows over the classes, of 0 and 1 or mixtures of such; where images have weights, a last column holds them
and the row is multiplied by it. So a mixture of two images weighs, and is labelled, as its parts are together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenfusion.multilabel import mean_average_precision


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

    def count_right(self, logits: Tensor, targets: Tensor) -> int:
        """How many predictions match the label that weighs most."""
        rows, _ = split_weights(targets, logits.shape[1])
        return int((logits.argmax(1) == rows.argmax(1)).sum())

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

    def count_right(self, logits: Tensor, targets: Tensor) -> int:
        """In how many images every class is on the right side of 1/2."""
        rows, _ = split_weights(targets, logits.shape[1])
        return int(((logits > 0) == (rows > 0.5)).all(1).sum())

    def judge(self, logits: Tensor, labels: Tensor) -> tuple[float, float]:
        """Mean loss and mAP of logits (N, K) and labels bool (N, K); the mAP is 0 where no image has a class."""
        loss = F.binary_cross_entropy_with_logits(logits, labels.float()).item()
        return loss, mean_average_precision(logits.numpy(), labels.numpy()) or 0.0


Loss = CrossEntropy | BinaryCrossEntropy


def join_weights(targets: Tensor, weights: Tensor | None) -> Tensor:
    """Targets (B, K) and weights (B,) as rows (B, K + 1): weight × target, and the weight; without weights as given."""
    return targets if weights is None else torch.cat([weights[:, None] * targets, weights[:, None]], 1)


def split_weights(targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """What `join_weights` joined, after any mixing."""
    if targets.shape[1] == num_classes:
        return targets, None
    weights = targets[:, num_classes]
    return targets[:, :num_classes] / weights[:, None], weights
