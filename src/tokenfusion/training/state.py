"""All that a run needs to go on as if it had never stopped, in one file."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from tokenfusion.checkpoint import load_tensors, load_weights_exactly, save_tensors
from tokenfusion.errors import InputError
from tokenfusion.models.official import with_present_names
from tokenfusion.training.distributed import World
from tokenfusion.training.sharded import (
    copy_into,
    forget_shards,
    last_good,
    load_shards,
    own_rows,
    pointer_of,
    read_pointer,
    save_shards,
    shard,
    whole,
)

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
        best_top1, best_epoch: on the held-out images, for early stopping; the mAP of multi-label data.
        decay_epoch: epochs done when the final decay of a run with an open end began; 0 before.
        records: a line of `metrics.jsonl` for each epoch done.
        finished: whether the last epoch is done, or training was stopped early.
        key: fingerprint of the images and the recipe.
        processes: how many took the last step.
        accumulate: parts that batches are computed in since memory ran out; 0 for as many as the recipe says.
        recent_losses: of the last good steps, by which a spike is told.
        skipped_steps, rollbacks, out_of_memory: how often that happened in the epoch under way.
        bad_steps: skipped or rolled back in the whole run.
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
    decay_epoch: int = 0
    records: list[Record] = field(default_factory=list)
    finished: bool = False
    key: str = ""
    processes: int = 1
    accumulate: int = 0
    recent_losses: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    rollbacks: int = 0
    out_of_memory: int = 0
    bad_steps: int = 0

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
        self.skipped_steps = self.rollbacks = self.out_of_memory = 0
        self.loss_sum = self.seconds = 0.0


class TrainState:
    """Model, average, optimiser and progress, saved together and loaded together.

    Args:
        model: what is trained.
        network: what the loop calls for `model`'s output; not `model` itself where processes exchange gradients.
        optimizer: what moves it.
        ema: decay of the average of weights; 0 for none.
        keep_best: whether to remember the weights of the best epoch.
        world: the processes that train it; the first one writes.
        spare: where `model` is spread over the processes, one in one piece to evaluate with, of the same weights; the
            average is then spread like `model`, and every process writes its part.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: float,
        keep_best: bool,
        network: nn.Module | None = None,
        world: World = World(),  # noqa: B008 - frozen
        spare: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.spare = spare
        self.network = network or model
        self.optimizer = optimizer
        self.average = ModelEmaV3(spare or model, decay=ema, use_warmup=True, foreach=spare is None) if ema else None
        if spare and self.average:
            shard(self.average.module)
        self.best: dict[str, Tensor] | None = {} if keep_best else None
        self.world = world
        self.progress = Progress(processes=world.size)

    @property
    def shipped(self) -> nn.Module:
        """The model that is evaluated and shipped: the average where there is one, gathered from all processes."""
        own: nn.Module = self.average.module if self.average else self.model
        if self.spare is None:
            return own
        self.spare.load_state_dict({name: whole(tensor) for name, tensor in own.state_dict().items()})
        return self.spare

    def update_average(self) -> None:
        if self.average:
            self.average.update(self.model, self.progress.step)

    def remember_best(self, top1: float) -> None:
        """Note this epoch's held-out accuracy, and keep its weights if it is the best so far."""
        if top1 > self.progress.best_top1:
            self.progress.best_top1, self.progress.best_epoch = top1, self.progress.epoch
            if self.best is not None:
                self.best = {name: tensor.detach().clone() for name, tensor in self.shipped.state_dict().items()}

    def change_processes(self) -> str:
        """Take note of how many processes go on; a line that says what it means where these are not as many."""
        before, self.progress.processes = self.progress.processes, self.world.size
        if before == self.world.size:
            return ""
        return (
            f"saved by {before} processes, and {self.world.size} go on: the same up to rounding and the draws of "
            "dropout, not to the bit\n"
        )

    def save(self, path: Path) -> None:
        """Write everything to one file, or where weights are spread to a file by each process; whole or not at all.

        Raises:
            InputError: it cannot be written, or weights are not finite; what was there before is intact.
        """
        broken = [name for name, tensor in self.model.state_dict().items() if not own_rows(tensor).isfinite().all()]
        if broken:
            raise InputError(
                f"{broken[0]} is not finite after step {self.progress.step}; {last_good(path)} "
                "train anew with a lower --lr or --precision fp32"
            )
        tensors = self.weights()
        if self.best:
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            values = {name: value for name, value in moments.items() if isinstance(value, Tensor)}
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        if self.spare is not None:
            save_shards(path, tensors, asdict(self.progress))
        elif self.world.is_first:
            save_tensors(path, tensors, asdict(self.progress))
            forget_shards(path)
        self.world.meet()  # a launcher may stop the one that writes as soon as another ends

    def weights(self) -> dict[str, Tensor]:
        """Tensors of the model and of its average, by the names that they are saved under."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.average.module.state_dict().items()}
        return tensors

    def load(self, path: Path) -> None:
        """Read what `save` wrote for the same data and recipe, as `progress.key` tells, by however many processes.

        Raises:
            InputError: the file is damaged, or of other data, another recipe or another version.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        sharded = pointer_of(path).exists()
        tensors, description = ({}, read_pointer(path)[1]) if sharded else load_whole(path)
        progress = progress_of(description, self.progress.key, path)  # another recipe's tensors do not fit
        if sharded:
            tensors = load_shards(path, self.weights(), parameters)

        weights = self.weights()
        names = {*weights, *(name.replace("model.", "best.", 1) for name in weights if name.startswith("model."))}
        tensors = with_present_names(tensors, names)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        if self.spare is not None:
            for name, tensor in self.weights().items():
                if not sharded:
                    copy_into(tensor, tensors[name])
        elif not sharded:
            load_weights_exactly(self.model, part("model."), path)
            if self.average:
                load_weights_exactly(self.average.module, part("ema."), path)
        if self.best is not None:
            self.best = part("best.")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part("optimizer.").items():
            index, moment = name.split(".")
            laid_out = tensor
            if tensor.ndim:  # laid out as its parameter: the fused step adds in the order of memory
                laid_out = torch.empty_like(parameters[int(index)], requires_grad=False)
                copy_into(laid_out, tensor)
            moments.setdefault(int(index), {})[moment] = laid_out
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.progress = progress


def load_whole(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a checkpoint in one file.

    Raises:
        InputError: it is damaged.
    """
    try:
        return load_tensors(path)
    except InputError as error:
        raise InputError(
            f"{path} is damaged: {error.__cause__}; delete the folder {path.parent}, and --resume starts anew"
        ) from error


def progress_of(description: dict[str, Any], key: str, path: Path) -> Progress:
    """What a checkpoint says of itself.

    Raises:
        InputError: it is of another version, or of a run with another key.
    """
    try:
        progress = Progress(**description)
    except TypeError as error:
        raise InputError(
            f"{path} was written by another version of tokenfusion: {error}; train again with another --out"
        ) from error
    if progress.key != key:
        raise InputError(
            f"the images or the fields of {path.parent.parent / 'recipe.toml'} are not those that the run began with "
            "(images are told by their pixels); put them back, or train a new run"
        )
    return progress


def fingerprint(*parts: Any) -> str:
    """A short name of some values, equal only where they are."""
    from hashlib import blake2b

    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()
