"""Clients of a service that cost little themselves: plain HTTP/1.1 over kept connections, each answer judged.

They share the cores with the service, so that what they take of the processor's time stands beside each figure.
"""

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Judge = Callable[[int, bytes], float]
"""How far the answer to an image, by its number, is from the truth: the largest difference of a score."""


class Connection:
    """One connection, which asks one request at a time and opens itself again where it was closed."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer.

        Raises:
            OSError, asyncio.IncompleteReadError: the other side hung up.
        """
        try:
            if self.reader is None or self.writer is None:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            self.writer.write(request)
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body = await self.reader.readexactly(size)
        except BaseException:
            self.close()
            raise
        if b"connection: close" in head:
            self.close()
        return int(head[9:12]), body

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


def post(path: str, body: bytes, kind: str) -> bytes:
    """A request."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@dataclass
class Tally:
    """What became of requests.

    Attributes:
        statuses: how many of each; 0 where the connection ended without an answer.
        seconds: of those that were answered with 200.
        ends: when these were, by the monotonic clock.
        farthest: largest difference of a score from the truth.
        wrong: answers that are farther from it than `tolerance`.
    """

    tolerance: float
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    farthest: float = 0.0
    wrong: int = 0

    def add(self, status: int, seconds: float, distance: float) -> None:
        self.statuses[status] += 1
        if status == 200:
            self.seconds.append(seconds)
            self.ends.append(time.monotonic())
            self.farthest = max(self.farthest, distance)
            self.wrong += not distance <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """With times in milliseconds; a percentile is a time that was measured."""
        ms = 1000 * np.array(self.seconds or [0.0])
        p50, p99 = (float(np.percentile(ms, q, method="higher")) for q in (50, 99))
        known = self.statuses[200] + self.statuses[429]
        return {
            "requests": self.statuses.total(),
            "answered": self.statuses[200],
            "refused_429": self.statuses[429],
            "lost": self.statuses[0],
            "otherwise": self.statuses.total() - known - self.statuses[0],
            "wrong": self.wrong,
            "farthest_score": self.farthest,
            "p50_ms": p50,
            "p99_ms": p99,
        }


class Load:
    """Requests of images, by their numbers, to a service on this machine.

    Args:
        port: of the service.
        requests: one for each image.
        judge: of the answers.
        tolerance: of a score.
    """

    def __init__(self, port: int, requests: Sequence[bytes], judge: Judge, tolerance: float) -> None:
        self.port, self.requests, self.judge, self.tolerance = port, requests, judge, tolerance

    async def one(
        self, connection: Connection, number: int, tally: Tally, began: float | None = None, patient: bool = False
    ) -> int:
        """Ask of an image, again while there is 429 where that is wished; gives the status."""
        which, began = number % len(self.requests), time.monotonic() if began is None else began
        while True:
            try:
                status, body = await connection.ask(self.requests[which])
            except (OSError, asyncio.IncompleteReadError):
                status, body = 0, b""
            if not (patient and status == 429):
                break
            await asyncio.sleep(1)
        seconds = time.monotonic() - began
        tally.add(status, seconds, self.judge(which, body) if status == 200 else 0.0)
        return status

    async def closed(
        self, clients: int, *, seconds: float = 0, requests: int = 0, patient: bool = False
    ) -> dict[str, Any]:
        """So many clients that each ask again as soon as they are answered, for so long or so often."""
        tally, numbers = Tally(self.tolerance), iter(range(requests or 10**9))
        began, cpu = time.monotonic(), time.process_time()
        end = began + (seconds or 10**9)

        async def client() -> None:
            connection = Connection(self.port)
            for number in numbers:
                await self.one(connection, number, tally, patient=patient)
                if time.monotonic() > end:
                    break
            connection.close()

        await asyncio.gather(*(client() for _ in range(clients)))
        return {"clients": clients} | summary(tally, time.monotonic() - began, time.process_time() - cpu)

    async def open(
        self, rate: float, seconds: float, meanwhile: Callable[[], None] | None = None, again: bool = False
    ) -> tuple[dict[str, Any], Tally]:
        """Requests that arrive by chance, `rate` a second on average, whether earlier ones are answered or not.

        Args:
            rate: requests a second.
            seconds: how long they come.
            meanwhile: called when a third of them have come.
            again: ask once more where the connection ended without an answer, which counts beside.
        """
        random, tally, free = np.random.default_rng(0), Tally(self.tolerance), list[Connection]()
        second, lost_twice = Tally(self.tolerance), 0
        gaps = random.exponential(1 / rate, int(rate * seconds))
        began, cpu, tasks = time.monotonic(), time.process_time(), set[asyncio.Task[None]]()

        async def arrive(number: int, at: float) -> None:
            nonlocal lost_twice
            connection = free.pop() if free else Connection(self.port)
            if await self.one(connection, number, tally, at) == 0 and again:
                lost_twice += await self.one(connection, number, second, at) != 200
            free.append(connection)

        at = began
        for number, gap in enumerate(gaps):
            at += gap
            if (wait := at - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            if meanwhile is not None and number == len(gaps) // 3:
                meanwhile()
            tasks.add(asyncio.create_task(arrive(number, at)))
        await asyncio.gather(*tasks)
        for connection in free:
            connection.close()
        found = {"arrivals_per_s": rate} | summary(tally, time.monotonic() - began, time.process_time() - cpu)
        return found | ({"lost_when_asked_again": lost_twice} if again else {}), tally


def summary(tally: Tally, seconds: float, cpu: float) -> dict[str, Any]:
    """What became of requests, and what the client took of all cores' time."""
    answered = tally.statuses[200]
    return tally.to_dict() | {
        "seconds": seconds,
        "images_per_s": answered / seconds,
        "client_share_of_cores": cpu / seconds / len(os.sched_getaffinity(0)),
    }


def judge_of(truths: Sequence[dict[str, float]]) -> Judge:
    """How far an answer of `predict`, as JSON, is from the scores of all classes that it should have."""

    def distance(number: int, body: bytes) -> float:
        found = {row["label"]: row["score"] for row in json.loads(body)["topk"]}
        truth = truths[number]
        return max(abs(found[label] - score) for label, score in truth.items()) if found.keys() == truth.keys() else 1.0

    return distance
