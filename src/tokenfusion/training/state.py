"""All that a run needs to go on as if it had never stopped, in one file."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from tokenfusion.checkpoint import load_tensors, load_weights_exactly, save_tensors
from tokenfusion.errors import InputError
from tokenfusion.models.official import with_present_names
from tokenfusion.training.distributed.fsdp import (
    copy_into,
    forget_shards,
    load_shards,
    own_rows,
    read_pointer,
    save_shards,
    shard,
    whole,
)
from tokenfusion.training.distributed.world import World
from tokenfusion.training.saved import last_good, pointer_of

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
        best_score, best_epoch: top-1 of the held-out images, or mAP of multi-label data, for early stopping.
        decay_epoch: epochs done when the final decay of a run with an open end began; 0 before.
        records: a line of `metrics.jsonl` for each epoch done.
        finished: whether the last epoch is done, or training was stopped early.
        identity: what the run is trained on and by (`identity.py`).
        key: the same in one word, of a run that was begun before there was `identity`.
        processes: how many took the last step.
        accumulate: parts that batches are computed in since memory ran out; 0 for as many as the recipe says.
        out_of_memory: how often that happened in the epoch under way.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    best_score: float = -1.0
    best_epoch: int = 0
    decay_epoch: int = 0
    records: list[Record] = field(default_factory=list)
    finished: bool = False
    identity: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    processes: int = 1
    accumulate: int = 0
    out_of_memory: int = 0

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
        self.step_in_epoch = self.correct = self.seen = self.out_of_memory = 0
        self.loss_sum = self.seconds = 0.0


class TrainState:
    """Model, average, optimiser and progress, saved together and loaded together.

    Args:
        model: what is trained.
        optimizer: what moves it.
        ema: decay of the average of weights; 0 for none.
        keep_best: whether to remember the weights of the best epoch.
        network: what the loop calls for `model`'s output; not `model` itself where processes exchange gradients.
        world: the processes that train it; the first one writes.
    """

    judges_both = True
    """Whether the trained weights can be judged beside their average: one piece of each is at hand."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: float,
        keep_best: bool,
        network: nn.Module | None = None,
        world: World = World(),  # noqa: B008 - frozen
    ) -> None:
        self.model = model
        self.network = model if network is None else network
        self.optimizer = optimizer
        self.average = self.make_average(ema) if ema else None
        self.best: dict[str, Tensor] | None = {} if keep_best else None
        self.world = world
        self.progress = Progress(processes=world.size)

    def make_average(self, decay: float) -> ModelEmaV3:
        """The average of the weights, which begins as they are."""
        return ModelEmaV3(self.model, decay=decay, use_warmup=True, foreach=True)

    def gather_shipped(self) -> nn.Module:
        """The model that is evaluated and shipped, the average where there is one; all processes must call this."""
        return self.average.module if self.average else self.model

    def update_average(self) -> None:
        if self.average:
            self.average.update(self.model, self.progress.step)

    def remember_best(self, score: float, shipped: nn.Module) -> None:
        """Note this epoch's held-out score, and keep the weights that reached it if it is the best so far."""
        if score > self.progress.best_score:
            self.progress.best_score, self.progress.best_epoch = score, self.progress.epoch
            if self.best is not None:
                self.best = {name: tensor.detach().clone() for name, tensor in shipped.state_dict().items()}

    def change_processes(self) -> str:
        """Take note of how many processes go on; a line that says what it means where these are not as many."""
        before, self.progress.processes = self.progress.processes, self.world.size
        if before == self.world.size:
            return ""
        return (
            f"saved by {before} processes, and {self.world.size} go on: the same up to rounding and the draws of "
            "dropout, not to the bit"
        )

    def save(self, path: Path) -> None:
        """Write everything, whole or not at all.

        A checkpoint holds the tensors `model.NAME` (weights and buffers), `ema.NAME` (their average, where there is
        one), `best.NAME` (those of the best epoch, where it is what ships) and `optimizer.INDEX.NAME` (what the
        optimiser keeps of each parameter: moments and steps), and as its description `Progress`: counters, the records
        of the epochs done, and the identity of the run. Random draws follow from the seed and the step: nothing of
        them is kept.

        Raises:
            InputError: it cannot be written, or weights are not finite; what was there before is intact.
        """
        broken = [name for name, tensor in self.model.state_dict().items() if not own_rows(tensor).isfinite().all()]
        if broken:
            raise InputError(
                f"{broken[0]} is not finite after step {self.progress.step}; {last_good(path)} "
                "train anew with a lower --lr or --precision fp32 and another --out"
            )
        self.write(path, self.tensors())
        self.world.meet()  # a launcher may stop the one that writes as soon as another ends

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names that they are saved under."""
        tensors = self.weights()
        if self.best:
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        return tensors

    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Let the first process write tensors and progress to one file."""
        if self.world.is_first:
            save_tensors(path, tensors, asdict(self.progress))
            forget_shards(path)

    def weights(self) -> dict[str, Tensor]:
        """Tensors of the model and of its average, by the names that they are saved under."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.average.module.state_dict().items()}
        return tensors

    def load(self, path: Path) -> None:
        """Read what `save` wrote for the same data and recipe, by however many processes.

        Raises:
            InputError: the file is damaged, or of another model or version.
        """
        progress = read_progress(path)
        spread = pointer_of(path).exists()
        tensors = load_shards(path, self.weights(), self.parameters) if spread else load_tensors(path)[0]
        weights = self.weights()
        names = {*weights, *(name.replace("model.", "best.", 1) for name in weights if name.startswith("model."))}
        tensors = with_present_names(tensors, names)
        if not spread:
            self.load_weights(tensors, path)
        if self.best is not None:
            self.best = part_of(tensors, "best.")
        self.load_moments(part_of(tensors, "optimizer."), path)
        self.progress = progress

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimiser moves, in the order in which it numbers them."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def load_weights(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Take over weights and their average from tensors in one piece, by the names that they are saved under."""
        load_weights_exactly(self.model, part_of(tensors, "model."), path)
        if self.average:
            load_weights_exactly(self.average.module, part_of(tensors, "ema."), path)

    def load_moments(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Take over what the optimiser keeps of each parameter, from tensors by INDEX.NAME.

        Raises:
            InputError: one fits no parameter.
        """
        parameters = self.parameters
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, _, moment = name.partition(".")
            shape = parameters[int(index)].shape if index.isdecimal() and int(index) < len(parameters) else None
            if not moment.isidentifier() or (tensor.ndim and tensor.shape != shape) or not tensor.isfinite().all():
                raise InputError(
                    f"{path} is damaged: optimizer.{name} fits no weight; delete the folder {path.parent}, and "
                    "--resume starts anew"
                )
            laid_out = tensor
            if tensor.ndim:  # laid out as its parameter: the fused step adds in the order of memory
                laid_out = torch.empty_like(parameters[int(index)], requires_grad=False)
                copy_into(laid_out, tensor)
            moments.setdefault(int(index), {})[moment] = laid_out
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


class SpreadState(TrainState):
    """The same of a model whose weights, average and moments are spread over the processes (FSDP).

    Args:
        whole_model: the same model in one piece, to evaluate and ship.
        others: as of `TrainState`.
    """

    judges_both = False

    def __init__(self, *others: Any, whole_model: nn.Module, **named: Any) -> None:
        self.whole_model = whole_model
        super().__init__(*others, **named)

    def make_average(self, decay: float) -> ModelEmaV3:
        average = ModelEmaV3(self.whole_model, decay=decay, use_warmup=True, foreach=False)
        shard(average.module)
        return average

    def gather_shipped(self) -> nn.Module:
        """Its weights are gathered from all processes, which must call this together."""
        own = super().gather_shipped().state_dict()
        self.whole_model.load_state_dict({name: whole(tensor) for name, tensor in own.items()})
        return self.whole_model

    def write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Let every process write its part."""
        save_shards(path, tensors, asdict(self.progress))

    def load_weights(self, tensors: dict[str, Tensor], path: Path) -> None:  # noqa: ARG002
        for name, tensor in self.weights().items():
            copy_into(tensor, tensors[name])


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_progress(path: Path) -> Progress:
    """How far a checkpoint's run is, by the checkpoint's description alone.

    Raises:
        InputError: it is damaged, or of another version.
    """
    description = read_pointer(path).description if pointer_of(path).exists() else read_header(path)
    for name in NO_LONGER_COUNTED:
        description.pop(name, None)
    for before, name in RENAMED.items():
        if before in description:
            description[name] = description.pop(before)
    try:
        progress = Progress(**description)
    except TypeError as error:
        raise InputError(
            f"{path} was written by another version of tokenfusion: {error}; train again with another --out"
        ) from error
    if fault := fault_in_progress(progress):
        raise InputError(f"{path} is damaged: {fault}; delete the folder {path.parent}, and --resume starts anew")
    return progress


def fault_in_progress(progress: Progress) -> str:
    """What cannot be true of a run's progress: a type, a range, or what does not go together; "" where nothing is."""
    fresh = Progress()
    for one in fields(Progress):
        value, kind = getattr(progress, one.name), type(getattr(fresh, one.name))
        right = type(value) is kind or (kind is float and type(value) is int)
        if not right or (kind is float and not math.isfinite(value)):
            return f"{one.name} is {str(value)[:40]}, not of type {kind.__name__}"
        if kind in (int, float) and value < (-1 if one.name == "best_score" else 0) and one.name != "loss_sum":
            return f"{one.name} is {value}, below 0"
    if progress.processes < 1 or progress.correct > progress.seen or progress.step_in_epoch > progress.step:
        return "its counts of processes, images or steps contradict each other"
    if len(progress.records) != progress.epoch or max(progress.best_epoch, progress.decay_epoch) > progress.epoch:
        return f"it has {len(progress.records)} records of {progress.epoch} epochs"
    numbers = [value for record in progress.records if isinstance(record, dict) for value in record.values()]
    if not all(isinstance(r, dict) for r in progress.records) or not all(type(n) in (int, float) for n in numbers):
        return "its records are not numbers by name"
    identity = progress.identity
    if identity and not all(isinstance(identity.get(part), dict) for part in ("recipe", "images")):
        return "it does not say what the run is trained on and by"
    return ""


NO_LONGER_COUNTED = ("recent_losses", "skipped_steps", "rollbacks", "bad_steps")
"""Fields of checkpoints that were written when a run could go on after a bad loss."""
RENAMED = {"best_top1": "best_score"}
"""Fields by the names that they had, in checkpoints that were written then."""


def read_header(path: Path) -> dict[str, Any]:
    """The description of a checkpoint in one file, whose tensors are not read.

    Raises:
        InputError: it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads((file.metadata() or {})["description"]))
    except (OSError, SafetensorError, ValueError, TypeError, RecursionError, KeyError) as error:
        raise InputError(
            f"{path} is damaged: {error}; delete the folder {path.parent}, and --resume starts anew"
        ) from error
