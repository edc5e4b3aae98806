"""How the processes that a launcher started find each other."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import version
from time import sleep

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from tokenfusion.errors import InputError
from tokenfusion.launch import Launch, choose_device, read_launch
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
