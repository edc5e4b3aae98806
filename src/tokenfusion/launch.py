"""What a launcher (torchrun, SLURM) says to each process that it starts: which of how many it is, and its GPU."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tokenfusion.errors import InputError
from tokenfusion.hardware import default_device


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
