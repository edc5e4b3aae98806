"""How the processes that a launcher (torchrun, SLURM) started find each other."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from time import sleep

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from tokenfusion.errors import InputError
from tokenfusion.hardware import default_device
from tokenfusion.training.distributed.heartbeat import heartbeat
from tokenfusion.training.distributed.world import FAILED, JOIN, World

STEP = timedelta(minutes=10)
"""Longest wait for the others in a step, or for the first one to write a checkpoint."""
LOST = re.compile("gloo|nccl|tcpstore|connection|broken pipe|timed out|recvvalue|sendbytes", re.IGNORECASE)
"""What torch says when another process is gone."""


@contextmanager
def processes() -> Iterator[World]:
    """Meet the other processes that the launcher started, as its variables say; tell them apart from a run alone.

    Raises:
        InputError: the variables are wrong, the others are not to be found, or one of them was lost later.
    """
    launch = read_launch(os.environ)
    if launch is None:
        yield World()
        return
    device = choose_device(launch)
    store = connect(launch)
    world = World(launch.rank, launch.size, launch.local_rank, store)
    gpu = device if device.type == "cuda" else None
    backend = "nccl" if gpu else "gloo"
    try:
        with heartbeat(store, world.rank):
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


@dataclass(frozen=True)
class Launch:
    """What the launcher's variables say: which process of how many this is, and where the first one listens."""

    rank: int
    size: int
    local_rank: int
    master: str
    port: int


def read_launch(variables: Mapping[str, str]) -> Launch | None:
    """From torchrun's variables, else SLURM's; None for a process that was started alone.

    Raises:
        InputError: some are missing, or contradict each other.
    """
    if "RANK" in variables or "WORLD_SIZE" in variables:
        launch = read_torchrun(variables)
    elif "SLURM_PROCID" in variables and whole_number("SLURM_NTASKS", variables.get("SLURM_NTASKS", "1")) > 1:
        launch = read_slurm(variables)
    else:
        return None
    if not 0 <= launch.rank < launch.size:
        raise InputError(
            f"this is process {launch.rank} of {launch.size}, which are numbered from 0 to {launch.size - 1}; "
            "give each process a RANK of its own below WORLD_SIZE, or start with torchrun"
        )
    return launch


def read_torchrun(variables: Mapping[str, str]) -> Launch:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not variables.get(name)]
    there = "RANK" if "RANK" in variables else "WORLD_SIZE"
    if missing:
        raise InputError(
            f"{there}={variables[there]} is set and {missing[0]} is not; start with torchrun, which sets "
            f"{', '.join(names)}, or unset {there} to train in one process"
        )
    rank, size, local, port = (whole_number(name, variables[name]) for name in (*names[:3], "MASTER_PORT"))
    return Launch(rank, size, local, variables["MASTER_ADDR"], port)


def read_slurm(variables: Mapping[str, str]) -> Launch:
    rank, size = (whole_number(name, variables[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS"))
    local = whole_number("SLURM_LOCALID", variables.get("SLURM_LOCALID", "0"))
    # the machines of SLURM's step may be fewer than the job's
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST", "")
    master = variables.get("MASTER_ADDR") or first_host(nodes)
    job = whole_number("SLURM_JOB_ID", variables.get("SLURM_JOB_ID", "0"))
    port = whole_number("MASTER_PORT", variables.get("MASTER_PORT", str(20_000 + job % 10_000)))
    return Launch(rank, size, local, master, port)


def whole_number(name: str, text: str) -> int:
    """A variable that must be a whole number."""
    if not text.isdecimal():
        raise InputError(f"{name}={text!r} is not a whole number; start with torchrun, or set it to one")
    return int(text)


def first_host(nodes: str) -> str:
    """The first machine of SLURM's short form: "gpu003" of "gpu[003-007,010]-ib,login"."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    if not found:
        raise InputError(f"SLURM_NODELIST={nodes!r} names no machine; set MASTER_ADDR to the first one's name")
    return "".join(part or "" for part in found.groups())


def choose_device(launch: Launch) -> torch.device:
    """Make this process's GPU the current one: its local rank's, or the only one that SLURM lets it see.

    Raises:
        InputError: there are more processes than GPUs.
    """
    device, count = default_device(), torch.cuda.device_count()
    if device.type != "cuda":
        return device
    if launch.local_rank >= count and not (count == 1 and "SLURM_PROCID" in os.environ):
        raise InputError(
            f"local process {launch.local_rank} has no GPU, as there are {count}; "
            f"start at most {count} on this machine (torchrun --nproc-per-node {count})"
        )
    index = launch.local_rank if launch.local_rank < count else 0
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def connect(launch: Launch) -> Store:
    """The store by which the processes find each other; the first one keeps it, unless torchrun does.

    Raises:
        InputError: the port is taken, or nobody answers.
    """
    keeps = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{launch.master}:{launch.port}"
    try:
        store = TCPStore(launch.master, launch.port, launch.size, is_master=keeps, timeout=JOIN, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if keeps:
            raise InputError(
                f"{where} cannot be listened on ({reason}); most often another run has the port: give another one, by "
                "`torchrun --master-port` or MASTER_PORT"
            ) from error
        raise InputError(
            f"process {launch.rank} of {launch.size} found nobody at {where} within {JOIN.total_seconds():g} s "
            f"({reason}); start process 0 there, or correct MASTER_ADDR and MASTER_PORT"
        ) from error
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def versions() -> dict[str, str]:
    """What must be the same in every process."""
    return {name: version(name) for name in ("tokenfusion", "torch", "torchvision", "timm")}
