"""Images of many requests in the model at once: BentoML's adaptive batching, which no public name of it gives.

`@bentoml.api(batchable=True)` batches requests before they are decoded, with the same options for all; here images are
decoded first, by threads, and each request keeps its own options, so that its dispatcher is called as it is.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from bentoml._internal.marshal.dispatcher import CorkDispatcher

from tokenfusion.serve.measure import BATCH_IMAGES, STAGE_SECONDS
from tokenfusion.serve.refusal import overloaded
from tokenfusion_runtime.image import Pixels
from tokenfusion_runtime.prediction import Floats


class Batches:
    """Prepared images of any number of requests, a batch after another through one model.

    Args:
        probabilities: of images (B, in_chans, h, w), called by one thread.
        size: images of a batch.
        seconds: that images may wait; the request is refused where they would wait longer.
    """

    def __init__(self, probabilities: Callable[[Pixels], Floats], size: int, seconds: float) -> None:
        self.probabilities, self.size = probabilities, size
        self.thread = ThreadPoolExecutor(1, "model")

        def refuse() -> Floats:
            raise overloaded()

        self.dispatcher = CorkDispatcher(int(1000 * seconds), size, fallback=refuse, get_batch_size=len)
        self.ask = self.dispatcher(self.answer)

    async def __call__(self, images: Pixels) -> Floats:
        """Probabilities (n, K) of prepared images (n, in_chans, h, w), of any number."""
        began = time.perf_counter()
        answered: Floats = await self.ask(images)
        STAGE_SECONDS.labels("wait_and_model").observe(time.perf_counter() - began)
        return answered

    async def answer(self, requests: Sequence[Pixels]) -> Sequence[Floats]:
        """Those of several requests, together."""
        ends = np.cumsum([len(images) for images in requests])
        BATCH_IMAGES.observe(int(ends[-1]))
        loop, began = asyncio.get_running_loop(), time.perf_counter()
        rows = await loop.run_in_executor(self.thread, self.probabilities, np.concatenate(requests))
        STAGE_SECONDS.labels("model").observe(time.perf_counter() - began)
        return np.split(rows, ends[:-1])

    def close(self) -> None:
        """End, when nothing waits any more."""
        self.dispatcher.shutdown()
        self.thread.shutdown(wait=False)
