"""Train a detector on a backbone of this package: torchvision's RetinaNet on the maps of CMT.

Usage: python examples/detector.py OUT.json [BACKBONE]

The set is made here, without a download: scikit-learn's handwritten digits, enlarged and pasted at known places onto
pieces of its two photographs. Training images have digits of their own and pieces of the photographs' left parts,
held-out ones other digits and pieces of the right parts. It is small and easy, and no COCO: it shows that gradients
reach the backbone, that the loss falls and that boxes are found on images that were not trained on.

Prints the loss and, before and after, three numbers of the held-out images (`judge`); writes them to OUT.json.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.transforms.v2.functional import resize

import tokenfusion  # noqa: F401 - registers its models with timm
from tokenfusion.hardware import default_device, hardware_name

SIDE = 96
"""Height and width of an image, in pixels."""
Target = dict[str, Tensor]
"""`boxes` (N, 4), x1 y1 x2 y2 in pixels; `labels` (N,); of what was found also `scores` (N,), best first."""


class PastedDigits:
    """Images (3, SIDE, SIDE) from 0 to 1 with digits at known places; the same index is always the same image.

    Args:
        held_out: whether digits and pieces of photographs are those that are not trained on.
    """

    def __init__(self, held_out: bool) -> None:
        found = load_digits()
        mine = np.arange(len(found.target)) % 4 == 0
        mine = mine if held_out else ~mine
        self.digits = torch.from_numpy(found.images[mine] / 16).float()  # (D, 8, 8)
        self.classes = torch.from_numpy(found.target[mine])
        photographs = [torch.tensor(photo).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
        middle = photographs[0].shape[2] // 2
        self.photographs = [photo[..., middle:] if held_out else photo[..., :middle] for photo in photographs]
        self.held_out = held_out

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        draw = np.random.default_rng((int(self.held_out), index))
        photo = self.photographs[draw.integers(len(self.photographs))]
        top, left = (int(draw.integers(size - SIDE + 1)) for size in photo.shape[1:])
        image = photo[:, top : top + SIDE, left : left + SIDE].clone()
        boxes: list[list[int]] = []
        labels: list[int] = []
        for _ in range(int(draw.integers(2, 6))):
            side = int(draw.integers(20, 37))
            x, y = (int(at) for at in draw.integers(SIDE - side + 1, size=2))
            box = [x, y, x + side, y + side]
            if boxes and box_iou(torch.tensor([box]), torch.tensor(boxes)).max() > 0:
                continue  # digits do not lie over each other
            number = int(draw.integers(len(self.digits)))
            ink = resize(self.digits[number][None], [side, side]).clamp(0, 1)
            colour = torch.from_numpy(draw.uniform(size=(3, 1, 1))).float()
            part = image[:, y : y + side, x : x + side]
            part.copy_(ink * colour + (1 - ink) * part)
            boxes.append(box)
            labels.append(int(self.classes[number]))
        return image, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)}


class Pyramid(nn.Module):
    """Maps of a backbone at 1/8, 1/16 and 1/32 of the image, brought to one width by a feature pyramid."""

    def __init__(self, name: str, out_channels: int = 64) -> None:
        super().__init__()
        body = timm.create_model(name, features_only=True, img_size=SIDE)
        wanted = [i for i, reduction in enumerate(body.feature_info.reduction()) if reduction in (8, 16, 32)]
        self.body = timm.create_model(name, features_only=True, img_size=SIDE, out_indices=wanted)
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.pyramid({str(i): found for i, found in enumerate(self.body(images))})
        return maps


def build(name: str) -> RetinaNet:
    """A detector of ten digits on a backbone of random weights."""
    backbone = Pyramid(name)
    levels = len(backbone.body.feature_info.channels())
    anchors = AnchorGenerator(tuple((16 * 2**level, 23 * 2**level) for level in range(levels)), ((1.0,),) * levels)
    return RetinaNet(backbone, num_classes=10, anchor_generator=anchors, min_size=SIDE, max_size=SIDE)


def train(detector: RetinaNet, images: PastedDigits, steps: int, batch_size: int, rate: float) -> list[float]:
    """The loss of every step."""
    optimizer = torch.optim.AdamW(detector.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    detector.train()
    losses = []
    for step in range(steps):
        batch = [images[step * batch_size + i] for i in range(batch_size)]
        loss = sum(detector([image for image, _ in batch], [target for _, target in batch]).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 25 == 0:
            print(f"step {step + 1} of {steps}: loss {np.mean(losses[-25:]):.3f}", flush=True)
    return losses


@torch.inference_mode()
def judge(detector: RetinaNet, images: PastedDigits, number: int) -> dict[str, float]:
    """How well digits are found in the first images.

    Returns:
        `ap50`: average precision at an IoU of 0.5, the mean over the ten classes; `recall50`: share of digits that one
        of an image's ten best boxes covers by an IoU of 0.5, whatever class it says; `iou`: the mean IoU of each digit
        with the best of those.
    """
    detector.eval()
    pairs = [(detector([image])[0], target) for image, target in (images[i] for i in range(number))]
    covered = torch.cat([box_iou(target["boxes"], found["boxes"][:10]).amax(1) if len(found["boxes"]) else
                         torch.zeros(len(target["boxes"])) for found, target in pairs])  # fmt: skip
    present = sorted({int(label) for _, target in pairs for label in target["labels"]})
    return {
        "ap50": float(np.mean([average_precision(pairs, label) for label in present])),
        "recall50": float((covered >= 0.5).float().mean()),
        "iou": float(covered.mean()),
    }


def average_precision(pairs: Sequence[tuple[Target, Target]], label: int) -> float:
    """The area below precision over recall of one class at an IoU of 0.5; each box of the truth is found once.

    Args:
        pairs: what was found in each image, best first, and what is there.
        label: the class.
    """
    said: list[tuple[float, bool]] = []  # score, and whether it is right
    there = 0
    for found, target in pairs:
        truth = target["boxes"][target["labels"] == label]
        boxes = found["boxes"][found["labels"] == label]
        there += len(truth)
        free = torch.ones(len(truth), dtype=torch.bool)
        overlaps = box_iou(boxes, truth)
        for score, row in zip(found["scores"][found["labels"] == label].tolist(), overlaps, strict=True):
            best = int((row * free).argmax()) if len(row) else -1
            right = best >= 0 and bool(free[best]) and row[best] >= 0.5
            said.append((score, bool(right)))
            if right:
                free[best] = False
    right = np.array([its for _, its in sorted(said, key=lambda one: -one[0])], dtype=bool)
    if not len(right):
        return 0.0
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[right].sum() / there)


def main(out: Path, backbone: str = "cmt_s", steps: int = 300, batch_size: int = 8, held_out: int = 100) -> None:
    start, load = time.process_time(), os.getloadavg()[0]
    torch.manual_seed(0)
    detector = build(backbone)
    others = PastedDigits(held_out=True)
    before = judge(detector, others, held_out)
    losses = train(detector, PastedDigits(held_out=False), steps, batch_size, rate=1e-3)
    after = judge(detector, others, held_out)
    last = max(steps // 10, 1)
    result = {
        "command": f"python examples/detector.py {out.name}" + f" {backbone}" * (backbone != "cmt_s"),
        "hardware": hardware_name(default_device()),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "backbone": backbone,
        "side": SIDE,
        "steps": steps,
        "batch_size": batch_size,
        "held_out": held_out,
        "loss_first": float(np.mean(losses[:last])),
        "loss_last": float(np.mean(losses[-last:])),
        "before": before,
        "after": after,
        "processor_minutes": (time.process_time() - start) / 60,
        "load_average_before": load,
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"loss {result['loss_first']:.3f} in the first {last} steps, {result['loss_last']:.3f} in the last")
    for name in before:
        print(f"{name} of {held_out} held-out images: {before[name]:.3f} before, {after[name]:.3f} after")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
