"""All that a run needs to go on as if it had never stopped, in one file."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from tokenfusion.checkpoint import load_tensors, load_weights_exactly, save_tensors
from tokenfusion.errors import InputError

Record = dict[str, float | int]


@dataclass
class Progress:
    """Where a run stands, in numbers.

    Attributes:
        step: optimiser steps done.
        epoch: epochs done.
        step_in_epoch: optimiser steps done in the epoch under way.
        loss_sum, correct, seen: over the images of the epoch under way.
        seconds: of training in the epoch under way.
        best_top1, best_epoch: on the held-out images, for early stopping.
        records: a line of `metrics.jsonl` for each epoch done.
        finished: whether the last epoch is done, or training was stopped early.
        key: fingerprint of the images and the recipe.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    best_top1: float = -1.0
    best_epoch: int = 0
    records: list[Record] = field(default_factory=list)
    finished: bool = False
    key: str = ""

    @property
    def train_loss(self) -> float:
        return self.loss_sum / max(self.seen, 1)

    @property
    def train_top1(self) -> float:
        return self.correct / max(self.seen, 1)

    @property
    def rate(self) -> float:
        """Training images per second in the epoch under way."""
        return self.seen / max(self.seconds, 1e-9)

    def add_step(self, loss: float, correct: int, images: int, seconds: float) -> None:
        self.step += 1
        self.step_in_epoch += 1
        self.loss_sum += loss * images
        self.correct += correct
        self.seen += images
        self.seconds += seconds

    def end_epoch(self, record: Record) -> None:
        self.records.append(record)
        self.epoch += 1
        self.step_in_epoch = self.correct = self.seen = 0
        self.loss_sum = self.seconds = 0.0


class TrainState:
    """Model, average, optimiser and progress, saved together and loaded together.

    Args:
        model: what is trained.
        optimizer: what moves it.
        ema: decay of the average of weights; 0 for none.
        keep_best: whether to remember the weights of the best epoch.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: float, keep_best: bool) -> None:
        self.model = model
        self.optimizer = optimizer
        self.average = ModelEmaV3(model, decay=ema, use_warmup=True) if ema else None
        self.best: dict[str, Tensor] | None = {} if keep_best else None
        self.progress = Progress()

    @property
    def shipped(self) -> nn.Module:
        """The model that is evaluated and shipped: the average where there is one."""
        return self.average.module if self.average else self.model

    def update_average(self) -> None:
        if self.average:
            self.average.update(self.model, self.progress.step)

    def remember_best(self, top1: float) -> None:
        """Note this epoch's held-out accuracy, and keep its weights if it is the best so far."""
        if top1 > self.progress.best_top1:
            self.progress.best_top1, self.progress.best_epoch = top1, self.progress.epoch
            if self.best is not None:
                self.best = {name: tensor.detach().clone() for name, tensor in self.shipped.state_dict().items()}

    def save(self, path: Path) -> None:
        """Write everything to one file, whole or not at all.

        Raises:
            InputError: it cannot be written, or weights are not finite; what was there before is intact.
        """
        broken = [name for name, tensor in self.model.state_dict().items() if not tensor.isfinite().all()]
        if broken:
            raise InputError(
                f"{broken[0]} is not finite after step {self.progress.step}; {last_good(path)} "
                "train anew with a lower --lr or --precision fp32"
            )
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.average.module.state_dict().items()}
        if self.best:
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            values = {name: value for name, value in moments.items() if isinstance(value, Tensor)}
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        save_tensors(path, tensors, asdict(self.progress))

    def load(self, path: Path) -> None:
        """Read what `save` wrote for the same model and recipe.

        Raises:
            InputError: the file is damaged, or of another model.
        """
        try:
            tensors, description = load_tensors(path)
        except InputError as error:
            raise InputError(
                f"{path} is damaged: {error.__cause__}; delete the folder {path.parent}, and --resume starts anew"
            ) from error

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        load_weights_exactly(self.model, part("model."), path)
        if self.average:
            load_weights_exactly(self.average.module, part("ema."), path)
        if self.best is not None:
            self.best = part("best.")
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part("optimizer.").items():
            index, moment = name.split(".")
            # laid out as its parameter: the fused step adds in the order of memory
            laid_out = torch.empty_like(parameters[int(index)]).copy_(tensor) if tensor.ndim else tensor
            moments.setdefault(int(index), {})[moment] = laid_out
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        try:
            self.progress = Progress(**description)
        except TypeError as error:
            raise InputError(
                f"{path} was written by another version of tokenfusion: {error}; train again with another --out"
            ) from error


def last_good(path: Path) -> str:
    """What is left to a run whose numbers are not finite any more."""
    return f"the last good checkpoint is kept as {path};" if path.exists() else "there is no checkpoint yet;"


def fingerprint(*parts: Any) -> str:
    """A short name of some values, equal only where they are."""
    from hashlib import blake2b

    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()
