"""CrossViT against timm's with the same weights and images, and images per second of the three papers' models.

    python benchmarks/papers.py --out benchmarks/results/papers.json

Inference takes PyTorch's allocator as it comes; the training steps, of either side, run after `keep_freed_memory`, as
`tokenfusion train` does.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import environment, time_in_turns
from tokenfusion import load_weights
from tokenfusion.files import write_json
from tokenfusion.hardware import autocast, default_device, keep_freed_memory

PAIRS = {"crossvit_9_dagger_224": "crossvit_9_dagger_240", "crossvit_small_224": "crossvit_small_240"}
ALONE = ("crossvit_9_dagger_224", "deepvit_16", "deepvit_s", "cmt_s")
PRECISIONS = ("fp32", "bf16")
INFERENCE_BATCHES, TRAINING_BATCH, ALONE_BATCH = (1, 8), 16, 8


def infer(model: nn.Module, precision: Any, images: Tensor) -> None:
    with torch.inference_mode(), autocast(images.device, precision):
        model(images)
    finish(images)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, precision: Any, images: Tensor) -> None:
    labels = torch.arange(len(images), device=images.device)
    optimizer.zero_grad()
    with autocast(images.device, precision):
        loss = F.cross_entropy(model(images).float(), labels)
    loss.backward()
    optimizer.step()
    finish(images)


def finish(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


def images_of(model: nn.Module, batch: int) -> Tensor:
    return torch.randn(batch, 3, *model.img_size, device=default_device())


def load_pairs() -> dict[str, dict[str, nn.Module]]:
    """Ours and timm's, with the same weights; they give the same logits."""
    pairs = {}
    for name, twin_name in PAIRS.items():
        twin = timm.create_model(twin_name).to(default_device()).eval()
        model = timm.create_model(name).to(default_device()).eval()
        load_weights(model, twin.state_dict())
        images = images_of(model, 2)
        with torch.inference_mode():
            torch.testing.assert_close(model(images), twin(images), rtol=0, atol=1e-4)
        pairs[name] = {"ours": model, "timm": twin}
    return pairs


def compare(ways: dict[str, Callable[[], None]], repetitions: int) -> dict[str, float]:
    times = time_in_turns(ways, repetitions)
    return times | {"timm / ours": times["timm"] / times["ours"]}


def learner(model: nn.Module, precision: str, images: Tensor) -> Callable[[], None]:
    return partial(step, model.train(), torch.optim.SGD(model.parameters(), lr=1e-4), precision, images)


def inferrer(model: nn.Module, precision: str, images: Tensor) -> Callable[[], None]:
    return partial(infer, model.eval(), precision, images)


def measure_pairs(pairs: dict[str, dict[str, nn.Module]], batch: int, what: str, repetitions: int) -> list[Any]:
    rows = []
    for name, pair in pairs.items():
        images = images_of(pair["ours"], batch)
        for precision in PRECISIONS:
            if what == "inference":
                ways = {way: inferrer(model, precision, images) for way, model in pair.items()}
            else:
                ways = {way: learner(model, precision, images) for way, model in pair.items()}
            rows.append({"model": name, "what": what, "batch": batch, "precision": precision})
            rows[-1] |= compare(ways, repetitions)
            print(rows[-1], flush=True)
    return rows


def measure_alone(what: str, batch: int) -> list[Any]:
    rows = []
    for name in ALONE:
        model = timm.create_model(name).to(default_device()).eval()
        images = images_of(model, batch)
        ways = {p: inferrer(model, p, images) for p in PRECISIONS}
        if what == "training step":
            ways = {p: learner(model, p, images) for p in PRECISIONS}
        speeds = {precision: 1000 * batch / ms for precision, ms in time_in_turns(ways, 3).items()}
        rows.append({"model": name, "what": what, "batch": batch} | speeds)
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--repetitions", type=int, default=9, help="turns of inference; training takes a third")
    options = parser.parse_args()
    result: dict[str, Any] = {
        **environment(),
        "pairs' unit": "ms per call, median",
        "alone's unit": "images per second",
    }
    pairs = load_pairs()
    result["pairs"] = [
        row for batch in INFERENCE_BATCHES for row in measure_pairs(pairs, batch, "inference", options.repetitions)
    ]
    result["alone"] = measure_alone("inference", ALONE_BATCH)
    keep_freed_memory()
    result["pairs"] += measure_pairs(pairs, TRAINING_BATCH, "training step", max(options.repetitions // 3, 1))
    result["alone"] += measure_alone("training step", TRAINING_BATCH)
    write_json(options.out, result)


if __name__ == "__main__":
    main()
