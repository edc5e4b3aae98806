"""The processes that train one model together, as one of them sees them: how they agree, wait and end together."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from tokenfusion.errors import InputError
from tokenfusion.hardware import default_device
from tokenfusion.training.distributed import heartbeat

JOIN = timedelta(minutes=2)
"""Longest wait for the other processes to come."""
READ = timedelta(hours=2)
"""Longest wait for the slowest process to have read the data."""
FAILED = "failed"
"""The message of a process that could not go on."""


class Requests:
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

    def stops(self, requests: Requests) -> bool:
        """Whether to stop now; several processes do once all of them know of it, after a step."""
        return requests.stop if self.size == 1 else requests.agreed_stop

    def agree(self, loss: Tensor, correct: Tensor, norm: Tensor, requests: Requests) -> tuple[float, int, float]:
        """A step's numbers as the host needs them, by the one wait for the device that a step has.

        Args:
            loss, correct: of this process's images, 0-dimensional: their mean loss, and how many predictions are right.
            norm: of the gradient, of all processes.
            requests: agreed on along with them.

        Returns:
            The loss as mean and the correct predictions as sum over the processes, and the norm.
        """
        numbers = torch.stack([loss.double(), correct.double()])
        if self.size == 1:
            requests.agreed_stop, requests.agreed_save = requests.stop, requests.save
            total, hits, length = torch.cat([numbers, norm.double()[None]]).tolist()
            return total, int(hits), length
        flags = torch.tensor([requests.stop, requests.save], dtype=torch.float64, device=loss.device)
        shared = torch.cat([numbers, flags])
        dist.all_reduce(shared)
        total, hits, stop, save, length = torch.cat([shared, norm.double()[None]]).tolist()
        requests.agreed_stop, requests.agreed_save = stop > 0, save > 0
        return total / self.size, int(hits), length

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of every process, as many each, one process's behind another's."""
        if self.size == 1:
            return rows
        mine = rows.to(default_device())
        all_rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(all_rows, mine)
        return torch.cat(all_rows).to(rows.device)
