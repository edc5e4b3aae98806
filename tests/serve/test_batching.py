"""Images of many requests are judged together, and each request gets its own answers."""

import asyncio
import threading

import numpy as np
import pytest

pytest.importorskip("bentoml", reason="the extra `serve` is not installed")

from tokenfusion.serve.batching import Batches, Waiting
from tokenfusion.serve.refusal import Refused


class Model:
    """Gives each image's first number, and waits in its first batch until it may go on."""

    def __init__(self):
        self.batches, self.begun, self.may_go_on = [], threading.Event(), threading.Event()

    def __call__(self, images):
        self.batches.append(images[:, 0].tolist())
        self.begun.set()
        assert self.may_go_on.wait(60)
        if 99 in images:
            raise RuntimeError("too hot")
        return images[:, :1].astype(np.float32)


def asked(requests, meanwhile=lambda _: None):
    """Answers of requests that come while the first is in the model, or what they raise; and the batches."""
    model = Model()

    async def run():
        batches = Batches(model, 4, 60)
        first = asyncio.create_task(batches(np.array([[0]])))
        await asyncio.to_thread(model.begun.wait, 60)
        tasks = [asyncio.create_task(batches(np.array(numbers)[:, None])) for numbers in requests]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        meanwhile(tasks)
        model.may_go_on.set()
        found = await asyncio.gather(first, *tasks, return_exceptions=True)
        batches.close()
        return [one if isinstance(one, BaseException) else one[:, 0].tolist() for one in found[1:]]

    return asyncio.run(run()), model.batches


def test_what_waits_when_the_model_is_free_goes_in_together_and_no_more_than_a_batch_has():
    answers, batches = asked([[1], [2, 3], [4, 5], [6]])
    assert answers == [[1], [2, 3], [4, 5], [6]]
    assert batches == [[0], [1, 2, 3], [4, 5, 6]]


def test_a_request_of_more_images_than_a_batch_has_is_answered_in_order():
    answers, batches = asked([list(range(1, 11)), [11]])
    assert answers == [list(range(1, 11)), [11]]
    assert batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]


def test_a_batch_that_fails_fails_its_requests_and_no_other():
    answers, _ = asked([[1, 99], [2, 3], [4]])
    assert [str(one) for one in answers[:2]] == ["too hot"] * 2
    assert answers[2] == [4]


def test_who_has_gone_is_not_judged():
    answers, batches = asked([[1], [2]], meanwhile=lambda tasks: tasks[0].cancel())
    assert isinstance(answers[0], asyncio.CancelledError)
    assert (answers[1], batches) == ([2], [[0], [2]])


def test_who_has_waited_too_long_is_refused():
    async def run():
        batches, loop = Batches(Model(), 4, 60), asyncio.get_running_loop()
        late, early = (Waiting(np.array([[1]]), loop.create_future(), until) for until in (1.0, 3.0))
        batches.waiting.extend([late, early])
        batch = batches.next_batch(2.0)
        return batch == [early], late.answer.exception()

    alone, refused = asyncio.run(run())
    assert (alone, type(refused), refused.status) == (True, Refused, 429)
