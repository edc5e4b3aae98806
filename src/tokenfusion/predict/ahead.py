"""Images decoded ahead of the model, by threads, so that it waits for no disk, no network and no decoder."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from tokenfusion.data.remote import Prefetcher
from tokenfusion.data.unlabelled import NamedImage, Part
from tokenfusion.errors import InputError

Made = TypeVar("Made")
SHARDS_AHEAD = 2
"""Of those that are fetched over a network."""


def prepared_ahead(
    parts: Sequence[Part], prepare: Callable[[NamedImage], Made], *, threads: int, waiting: int
) -> Generator[Future[Made] | InputError | None]:
    """Read parts one after another in a thread, and prepare their images in others.

    Args:
        parts: what to read.
        prepare: called with each image, by several threads at once.
        threads: that prepare.
        waiting: most images that are prepared, or being prepared, and not yet taken.

    Yields:
        each image as a future, in order, and behind those of each part None, or why the rest of it cannot be read.
    """
    ready: queue.SimpleQueue[Future[Made] | BaseException | None] = queue.SimpleQueue()
    room, ended = threading.Semaphore(waiting), threading.Event()

    def read() -> None:
        # each decodes alone, and leaves the threads that PyTorch computes with to the model
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for part in fetched_ahead(parts):
                end: BaseException | None = None
                try:
                    for image in part.images():
                        room.acquire()
                        if ended.is_set():
                            pool.shutdown(cancel_futures=True)
                            return
                        ready.put(pool.submit(prepare, image))
                except BaseException as error:  # whoever takes the images is to meet it
                    end = error
                ready.put(end)

    threading.Thread(target=read, daemon=True).start()
    left = len(parts)
    try:
        while left:
            item = ready.get()
            if isinstance(item, Future):
                room.release()
                yield item
            elif item is None or isinstance(item, InputError):
                left -= 1
                yield item
            else:
                raise item
    finally:
        ended.set()
        room.release()


def fetched_ahead(parts: Sequence[Part]) -> Iterator[Part]:
    """The parts in order, while those to come are fetched; what goes wrong is met when they are read."""

    def fetch(number: int) -> None:
        if (bring := parts[number].fetch) is not None:
            bring()

    prefetcher, wanted = Prefetcher(fetch), 0
    try:
        for number, part in enumerate(parts):
            while wanted < min(number + 1 + SHARDS_AHEAD, len(parts)):
                prefetcher.want(wanted)
                wanted += 1
            yield part
    finally:
        prefetcher.close()
