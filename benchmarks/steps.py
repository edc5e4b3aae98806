"""Where a training step of a fused preset goes, and how many multiply-adds a second it does beside its CNN parent.

    python benchmarks/steps.py --out benchmarks/results/steps.json

Processor time of one thread, which other work on the machine changes little; all that is timed takes turns. `CNN` and
`transformer` are forward and backward pass of either parent alone, `exchange and head` what the fused model's take
longer, `optimiser` with the gradient's norm, `average` the EMA, `loading` a batch from memory with its augmentation,
`host` what the whole step takes longer than all these.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import environment, time_in_turns
from tokenfusion.files import write_json
from tokenfusion.hardware import autocast
from tokenfusion.models.cost import count_macs
from tokenfusion.models.fused_model import FusedModel
from tokenfusion.recipe import Recipe
from tokenfusion.training.auto.timing import prepare_steps, random_images
from tokenfusion.training.distributed.world import Requests
from tokenfusion.training.step import compute_gradients, train_step

PARENT = "resnet_micro"
FUSED = ("tokenfusion_layerwise_micro", "tokenfusion_early_micro", "tokenfusion_late_micro")
CLASSES = tuple(map(str, range(10)))


def ways_of(name: str, batch_size: int) -> dict[str, Callable[[], Any]]:
    """A model's whole step and its parts, each as a call."""
    recipe = Recipe("digits", model=name, ema=0.99)
    setup, state = prepare_steps(recipe, random_images(batch_size, CLASSES, (32, 32)), CLASSES, batch_size)
    batch, model = next(setup.batches.epoch(0)), state.model.train()
    images = setup.classifier.to_input(batch[0])
    inputs, targets = setup.mixing(images, batch[1])

    def step() -> None:
        train_step(setup, state, batch, Requests())
        state.update_average()

    def move() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        state.optimizer.step()

    def learn(part: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with autocast(images.device, recipe.precision):
            answers = part(images)
        answers.float().square().mean().backward()

    ways: dict[str, Callable[[], Any]] = {
        "step": step,
        "gradients": lambda: compute_gradients(setup, state, inputs, targets),
        "optimiser": move,
        "average": state.update_average,
        "loading": lambda: next(setup.batches.epoch(0)),
    }
    if isinstance(model, FusedModel):
        ways |= {"CNN": lambda: learn(model.cnn), "transformer": lambda: learn(model.vit)}
    return ways


def measure(batch_size: int, turns: int) -> list[dict[str, Any]]:
    """Milliseconds of every part of every model's step."""
    names = (PARENT, *FUSED)
    ways = {(name, part): call for name in names for part, call in ways_of(name, batch_size).items()}
    times = time_in_turns(ways, turns, clock=time.process_time)  # type: ignore[arg-type,type-var]
    rows = []
    for name in names:
        ms = {part: value for (other, part), value in times.items() if other == name}
        ms["host"] = ms["step"] - sum(ms[part] for part in ("gradients", "optimiser", "average"))
        if "CNN" in ms:
            ms["exchange and head"] = ms["gradients"] - ms["CNN"] - ms["transformer"]
        macs = count_macs(name, num_classes=len(CLASSES))
        rate = 1000 * batch_size * macs / (ms["step"] + ms["loading"])
        rows.append({"model": name, "macs": macs, "ms": ms, "macs_per_s": rate})
        rows[-1]["beside_parent"] = rate / rows[0]["macs_per_s"]
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {**environment(), "batch_size": options.batch_size, "aim": 0.85}
    write_json(options.out, result | {"results": measure(options.batch_size, options.turns)})


if __name__ == "__main__":
    main()
