"""Images of many requests in the model at once: whatever waits when the model is free goes in together.

BentoML's adaptive batching lets the model stand idle while it waits for more images, and longer the longer requests
have waited before.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tokenfusion.serve.measure import BATCH_IMAGES, STAGE_SECONDS, WAITING_IMAGES
from tokenfusion.serve.refusal import Refused, overloaded
from tokenfusion_runtime.image import Pixels
from tokenfusion_runtime.prediction import Floats

Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class Waiting:
    """Images that wait for the model, no more than a batch has.

    Attributes:
        images: prepared, (n, in_chans, h, w).
        answer: their probabilities (n, K), once there are any; cancelled where nobody wants them any more.
        until: by the loop's clock, when they have waited too long.
    """

    images: Pixels
    answer: asyncio.Future[Floats]
    until: float


class Batches:
    """Prepared images of any number of requests, a batch after another through one model.

    Args:
        probabilities: of images (B, in_chans, h, w), called by one thread.
        size: most images of a batch.
        seconds: that images may wait; the request is refused where they have waited longer.
    """

    def __init__(self, probabilities: Callable[[Pixels], Floats], size: int, seconds: float) -> None:
        self.probabilities, self.size, self.seconds = probabilities, size, seconds
        self.thread = ThreadPoolExecutor(1, "model")
        self.waiting = deque[Waiting]()
        self.free, self.between = asyncio.Lock(), asyncio.Lock()
        self.working: asyncio.Task[None] | None = None

    async def __call__(self, images: Pixels) -> Floats:
        """Probabilities (n, K) of prepared images (n, in_chans, h, w), of any number.

        Raises:
            Refused: they have waited too long.
        """
        began, loop = time.perf_counter(), asyncio.get_running_loop()
        until, parts = loop.time() + self.seconds, range(0, len(images), self.size)
        waiting = [Waiting(images[i : i + self.size], loop.create_future(), until) for i in parts]
        self.waiting.extend(waiting)
        WAITING_IMAGES.inc(len(images))
        if self.working is None or self.working.done():
            self.working = loop.create_task(self.work())
        answered = np.concatenate(await asyncio.gather(*(one.answer for one in waiting)))
        STAGE_SECONDS.labels("wait_and_model").observe(time.perf_counter() - began)
        return answered

    async def work(self) -> None:
        """Answer a batch after another until nothing waits."""
        while self.waiting:
            async with self.free:  # the batch is what waits when the model is free, and not before
                if batch := self.next_batch(asyncio.get_running_loop().time()):
                    await self.answer(batch)

    async def answer(self, batch: Sequence[Waiting]) -> None:
        """Give each of a batch its probabilities."""
        began = time.perf_counter()
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self.thread, self.judge, batch)
        except Exception as error:  # whatever the engine raises is for those to hear that are in the batch
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        STAGE_SECONDS.labels("model").observe(time.perf_counter() - began)
        ends = np.cumsum([len(one.images) for one in batch])
        for one, found in zip(batch, np.split(rows, ends[:-1]), strict=True):
            if not one.answer.done():
                one.answer.set_result(found)

    async def in_turn(self, work: Callable[[], Found], has_gone: Callable[[], Awaitable[bool]]) -> Found:
        """Do something else with the model, between two batches; one at a time, so that no batch waits for two.

        Args:
            work: to be done, which nothing ends once it has begun.
            has_gone: whether who wanted it has gone, asked when its turn comes.

        Raises:
            Refused: it has waited too long for others like it, or nobody wants it any more.
        """
        try:
            async with asyncio.timeout(self.seconds):
                await self.between.acquire()
        except TimeoutError as error:
            raise overloaded("waited") from error
        try:
            async with self.free:
                if await has_gone():
                    raise Refused("cut", "this request", "the connection ended before its turn came", "ask again")
                return await asyncio.get_running_loop().run_in_executor(self.thread, work)
        finally:
            self.between.release()

    def next_batch(self, now: float) -> list[Waiting]:
        """Those that have waited longest, as many as go into a batch; none where nothing waits."""
        batch, images = list[Waiting](), 0
        while self.waiting and images + len(self.waiting[0].images) <= self.size:
            one = self.waiting.popleft()
            WAITING_IMAGES.dec(len(one.images))
            if one.answer.done():
                continue
            if one.until < now:
                one.answer.set_exception(overloaded("waited"))
                continue
            batch.append(one)
            images += len(one.images)
        return batch

    def judge(self, batch: Sequence[Waiting]) -> Floats:
        """Probabilities of all images of a batch, in the thread that the model has for itself."""
        images = np.concatenate([one.images for one in batch])
        BATCH_IMAGES.observe(len(images))
        return self.probabilities(images)

    def close(self) -> None:
        """End its thread, when nothing waits any more."""
        self.thread.shutdown(wait=False)
