"""Several processes that train one model together: how they find each other, agree, and end together."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from inspect import signature
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from tokenfusion.classifier import Classifier
from tokenfusion.errors import InputError
from tokenfusion.hardware import autocast, default_device
from tokenfusion.recipe import Recipe
from tokenfusion.training import heartbeat

JOIN = timedelta(minutes=2)
"""Longest wait for the other processes to come."""
READ = timedelta(hours=2)
"""Longest wait for the slowest process to have read the data."""
STEP = timedelta(minutes=10)
"""Longest wait for the others in a step, or for the first one to write a checkpoint."""


class Wishes:
    """What is to happen after the step under way: what this process would like, and what all have agreed on.

    Attributes:
        stop, save: this process would like to stop, or to save a checkpoint.
        agreed_stop, agreed_save: at least one process would, as all know.
    """

    def __init__(self) -> None:
        self.stop = self.save = self.agreed_stop = self.agreed_save = False


@dataclass(frozen=True)
class World:
    """The processes that train together, as one of them sees them; by default it is alone.

    Attributes:
        rank: its number, from 0; the first one writes the files.
        size: how many there are.
        local_rank: its number on its machine.
        store: where they leave messages before the first step; None where training is not distributed at all.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Store | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def exchange(self, topic: str, message: str, limit: timedelta | None = None) -> list[str]:
        """Every process's message under a topic of which there has been none before, by rank.

        Raises:
            InputError: one did not come within the limit.
        """
        if self.store is None:
            return [message]
        limit = limit or JOIN
        self.store.set(f"{topic}/{self.rank}", message)
        if self.is_first:
            keys = [f"{topic}/{rank}" for rank in range(self.size)]
            for rank, key in enumerate(keys):
                self.wait(key, limit, f"process {rank} of {self.size}")
            self.store.set(topic, json.dumps([self.store.get(key).decode() for key in keys]))
        self.wait(topic, limit + JOIN, f"the others of {self.size} processes")
        messages: list[str] = json.loads(self.store.get(topic))
        return messages

    def wait(self, key: str, limit: timedelta, whom: str) -> None:
        """Wait for a message; InputError where it does not come in time, or another process has failed or is gone."""
        assert self.store is not None
        end, pause = monotonic() + limit.total_seconds(), 0.01
        others = heartbeat.Pulse(self.store, range(1, self.size) if self.is_first else [0])
        while not self.store.check([key]):
            if self.store.check([FAILED]):
                raise InputError(f"process {self.store.get(FAILED).decode()}")
            if (gone := others.silent()) is not None:
                raise InputError(
                    f"process {gone} of {self.size} has given no sign of life for {heartbeat.SILENCE:g} s: it was "
                    "killed, or its machine is gone; what it or its launcher said last has the reason; start all of "
                    "them again with `tokenfusion train --resume RUN`"
                )
            if monotonic() > end:
                raise InputError(
                    f"process {self.rank} waited {limit.total_seconds():g} s for {whom}, in vain; start all of them, "
                    "with the same master; under SLURM by `srun`, and a single process without SLURM_PROCID and "
                    "SLURM_NTASKS"
                )
            sleep(pause)
            pause = min(2 * pause, 0.25)

    @contextmanager
    def together(self, topic: str, limit: timedelta | None = None) -> Iterator[None]:
        """Do something in every process, and go on only if it went well in all of them.

        Raises:
            InputError: it went wrong in some process; on each machine the first process says so, the others just end.
        """
        mine: InputError | None = None
        try:
            yield
        except InputError as error:
            mine = error
        reasons = self.exchange(topic, "" if mine is None else str(mine), limit)
        failed = [rank for rank, reason in enumerate(reasons) if reason]
        if not failed:
            return
        if mine is not None and self.rank == failed[0]:
            raise mine
        if self.local_rank == 0 and failed[0] != 0:
            raise InputError(f"process {failed[0]} of {self.size} ended: {reasons[failed[0]]}") from mine
        raise SystemExit(2)

    def require_same(self, topic: str, fields: Mapping[str, Any], remedy: str) -> None:
        """Refuse processes that differ in a field.

        Raises:
            InputError: naming the process and the first field.
        """
        own = {name: repr(value) for name, value in fields.items()}
        first, *others = (json.loads(message) for message in self.exchange(topic, json.dumps(own)))
        for rank, other in enumerate(others, 1):
            for name in first | other:
                if first.get(name) != other.get(name) and self.local_rank:
                    raise SystemExit(2)  # the first process of each machine says it
                if first.get(name) != other.get(name):
                    raise InputError(
                        f"process {rank} has {name}={other.get(name)}, and process 0 has {name}={first.get(name)}; "
                        f"{remedy}"
                    )

    def meet(self) -> None:
        """Go on once all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def stops(self, wishes: Wishes) -> bool:
        """Whether to stop now; several processes do once all of them know of it, after a step."""
        return wishes.stop if self.size == 1 else wishes.agreed_stop

    def agree(self, loss: float, correct: int, wishes: Wishes) -> tuple[float, int]:
        """The loss as mean and the correct predictions as sum over the processes; wishes are agreed on with them."""
        if self.size == 1:
            wishes.agreed_stop, wishes.agreed_save = wishes.stop, wishes.save
            return loss, correct
        numbers = torch.tensor([loss, correct, wishes.stop, wishes.save], dtype=torch.float64, device=default_device())
        dist.all_reduce(numbers)
        total, hits, stop, save = numbers.tolist()
        wishes.agreed_stop, wishes.agreed_save = stop > 0, save > 0
        return total / self.size, int(hits)

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of every process, as many each, one process's behind another's."""
        if self.size == 1:
            return rows
        mine = rows.to(default_device())
        all_rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(all_rows, mine)
        return torch.cat(all_rows).to(rows.device)


@dataclass(frozen=True)
class Place:
    """What the launcher's variables say: which process of how many this is, and where the first one listens."""

    rank: int
    size: int
    local_rank: int
    master: str
    port: int

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> "Place | None":
        """From torchrun's variables, else SLURM's; None for a process that was started alone.

        Raises:
            InputError: some are missing, or contradict each other.
        """
        if "RANK" in variables or "WORLD_SIZE" in variables:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            missing = [name for name in names if not variables.get(name)]
            there = "RANK" if "RANK" in variables else "WORLD_SIZE"
            if missing:
                raise InputError(
                    f"{there}={variables[there]} is set and {missing[0]} is not; start with torchrun, which sets "
                    f"{', '.join(names)}, or unset {there} to train in one process"
                )
            rank, size, local, port = (whole_number(name, variables[name]) for name in (*names[:3], "MASTER_PORT"))
            place = cls(rank, size, local, variables["MASTER_ADDR"], port)
        elif "SLURM_PROCID" in variables and whole_number("SLURM_NTASKS", variables.get("SLURM_NTASKS", "1")) > 1:
            rank, size = (whole_number(name, variables[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS"))
            local = whole_number("SLURM_LOCALID", variables.get("SLURM_LOCALID", "0"))
            master = variables.get("MASTER_ADDR") or first_host(nodes_of(variables))
            job = whole_number("SLURM_JOB_ID", variables.get("SLURM_JOB_ID", "0"))
            port = whole_number("MASTER_PORT", variables.get("MASTER_PORT", str(20_000 + job % 10_000)))
            place = cls(rank, size, local, master, port)
        else:
            return None
        if not 0 <= place.rank < place.size:
            raise InputError(
                f"this is process {place.rank} of {place.size}, which are numbered from 0 to {place.size - 1}; "
                "give each process a RANK of its own below WORLD_SIZE, or start with torchrun"
            )
        return place


def versions() -> dict[str, str]:
    """What must be the same in every process."""
    return {name: version(name) for name in ("tokenfusion", "torch", "torchvision", "timm")}


def refuse_alone(world: World, recipe: Recipe) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        InputError: `auto`, for which each would measure something else, or matrices in pieces for Muon.
    """
    if world.store is not None and recipe.parallel == "fsdp" and recipe.optimizer == "muon":
        raise InputError(
            "optimizer=muon orthogonalises whole matrices, and parallel=fsdp spreads them over the processes; "
            "give --optimizer adamw, or --parallel ddp"
        )
    measured = [name for name in recipe.autos if name != "epochs"]  # whose end all processes see alike
    if world.size > 1 and measured:
        name = measured[0]
        raise InputError(
            f"{name}=auto is chosen by a single process; train without torchrun until the first step and resume with "
            f"it, or give --{name.replace('_', '-')} a number"
        )


def whole_number(name: str, text: str) -> int:
    """A variable that must be a whole number."""
    if not text.isdecimal():
        raise InputError(f"{name}={text!r} is not a whole number; start with torchrun, or set it to one")
    return int(text)


def nodes_of(variables: Mapping[str, str]) -> str:
    """The machines of SLURM's step, which may be fewer than the job's."""
    return variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST", "")


def first_host(nodes: str) -> str:
    """The first machine of SLURM's short form: "gpu003" of "gpu[003-007,010]-ib,login"."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if not found:
        raise InputError(f"SLURM_NODELIST={nodes!r} names no machine; set MASTER_ADDR to the first one's name")
    return "".join(part or "" for part in found.groups())


@contextmanager
def processes() -> Iterator[World]:
    """Meet the other processes that the launcher started, as its variables say; tell them apart from a run alone.

    Raises:
        InputError: the variables are wrong, the others are not to be found, or one of them was lost later.
    """
    place = Place.of(os.environ)
    if place is None:
        yield World()
        return
    device = choose_device(place)
    store = connect(place)
    world = World(place.rank, place.size, place.local_rank, store)
    gpu = device if device.type == "cuda" else None
    backend = "nccl" if gpu else "gloo"
    try:
        with heartbeat.heartbeat(store, world.rank):
            world.exchange("hello", "")
            dist.init_process_group(
                backend, store=store, rank=world.rank, world_size=world.size, timeout=STEP, device_id=gpu
            )
            yield world
    except (Exception, KeyboardInterrupt) as error:
        if not (isinstance(error, RuntimeError) and LOST.search(str(error))):  # torch knows no finer class for it
            with suppress(RuntimeError):  # the store may be gone
                store.set(FAILED, f"{world.rank} of {world.size} ended: {str(error) or type(error).__name__}")
                sleep(0.5)  # the others ask four times a second, and the store may end with this process
            raise
        with suppress(RuntimeError):  # its last words, unless the store is gone with it
            if store.check([FAILED]):
                raise InputError(f"process {store.get(FAILED).decode()}") from error
        raise InputError(
            f"process {world.rank} of {world.size} lost another one ({str(error).splitlines()[0]}); what that one or "
            "its launcher said last has the reason; start all of them again with `tokenfusion train --resume RUN`"
        ) from error
    dist.destroy_process_group()


FAILED = "failed"
"""The message of a process that could not go on."""
LOST = re.compile("gloo|nccl|tcpstore|connection|broken pipe|timed out|recvvalue|sendbytes", re.IGNORECASE)
"""What torch says when another process is gone."""


def choose_device(place: Place) -> torch.device:
    """Make this process's GPU the current one: its local rank's, or the only one that SLURM lets it see.

    Raises:
        InputError: there are more processes than GPUs.
    """
    device, count = default_device(), torch.cuda.device_count()
    if device.type != "cuda":
        return device
    if place.local_rank >= count and not (count == 1 and "SLURM_PROCID" in os.environ):
        raise InputError(
            f"local process {place.local_rank} has no GPU, as there are {count}; "
            f"start at most {count} on this machine (torchrun --nproc-per-node {count})"
        )
    index = place.local_rank if place.local_rank < count else 0
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def connect(place: Place) -> Store:
    """The store by which the processes find each other; the first one keeps it, unless torchrun does.

    Raises:
        InputError: the port is taken, or nobody answers.
    """
    keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{place.master}:{place.port}"
    try:
        store = TCPStore(place.master, place.port, place.size, is_master=keeps, timeout=JOIN, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if keeps:
            raise InputError(
                f"{where} cannot be listened on ({reason}); most often another run has the port: give another one, by "
                "`torchrun --master-port` or MASTER_PORT"
            ) from error
        raise InputError(
            f"process {place.rank} of {place.size} found nobody at {where} within {JOIN.total_seconds():g} s "
            f"({reason}); start process 0 there, or correct MASTER_ADDR and MASTER_PORT"
        ) from error
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def average_gradients(classifier: Classifier, world: World) -> nn.Module:
    """What the loop calls for a model whose gradients are averaged over the processes; for one, the model itself."""
    if world.size == 1:
        return classifier.model
    # BatchNorm's buffers are the same everywhere, as its statistics are of all processes; torch 2.14 renamed the option
    names = signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    network = DistributedDataParallel(classifier.model, static_graph=True, **{option: False})  # type: ignore[arg-type]
    rehearse(network, classifier)
    return network


def rehearse(network: nn.Module, classifier: Classifier) -> None:
    """Take a step on nothing, in which torch learns the order of gradients, and leave no trace of it.

    From the second step on it adds them up in this order; a resumed run would otherwise add its first ones in another.
    """
    buffers = [buffer.clone() for buffer in network.buffers()]
    blank = torch.zeros(2, classifier.preprocess.in_chans, *classifier.preprocess.img_size, device=classifier.device)
    for _ in range(2):
        with autocast(classifier.device, classifier.precision):
            output = network.train()(blank)
        output.float().sum().backward()
    for parameter in network.parameters():
        parameter.grad = None
    for buffer, before in zip(network.buffers(), buffers, strict=True):
        buffer.copy_(before)


def gradients_exchanged(network: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Within it, a backward pass averages gradients over the processes, or keeps them for a later one that does."""
    if isinstance(network, DistributedDataParallel) and not now:
        return network.no_sync()
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)
    return nullcontext()
