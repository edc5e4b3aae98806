"""Images of many requests are judged together, and each request gets its own answers."""

import asyncio
import threading

import numpy as np
import pytest

pytest.importorskip("bentoml", reason="the extra `serve` is not installed")

from prometheus_client import REGISTRY

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


async def stays():
    """Of a client that waits for its answer."""
    return False


def waiting_images():
    return REGISTRY.get_sample_value("tokenfusion_waiting_images")


def asked(requests, meanwhile=lambda _: None):
    """Answers of requests that come while the first is in the model, or what they raise; and the batches."""
    model = Model()

    async def run():
        batches = Batches(model, 4, 60)
        before = waiting_images()
        first = asyncio.create_task(batches(np.array([[0]])))
        await asyncio.to_thread(model.begun.wait, 60)
        tasks = [asyncio.create_task(batches(np.array(numbers)[:, None])) for numbers in requests]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert waiting_images() - before == sum(map(len, requests))
        meanwhile(tasks)
        model.may_go_on.set()
        found = await asyncio.gather(first, *tasks, return_exceptions=True)
        batches.close()
        assert waiting_images() == before
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


def test_a_batch_waits_for_one_other_work_at_most_however_many_there_are():
    model, done = Model(), []

    async def run():
        batches = Batches(model, 4, 60)
        first = asyncio.create_task(batches(np.array([[0]])))
        await asyncio.to_thread(model.begun.wait, 60)
        works = [lambda i=i: done.append(i) or len(model.batches) for i in "abc"]
        others = [asyncio.create_task(batches.in_turn(work, stays)) for work in works]
        await asyncio.sleep(0)
        second = asyncio.create_task(batches(np.array([[1]])))
        await asyncio.sleep(0)
        model.may_go_on.set()
        batches_before = (await asyncio.gather(first, second, *others))[2:]
        batches.close()
        return batches_before

    batches_before = asyncio.run(run())
    assert done == ["a", "b", "c"]
    assert batches_before == [1, 2, 2]


def test_who_waits_too_long_for_other_work_is_refused_when_that_ends():
    begun, may_go_on = threading.Event(), threading.Event()

    def work():
        begun.set()
        assert may_go_on.wait(60)

    async def run():
        loop, model = asyncio.get_running_loop(), Model()
        model.may_go_on.set()
        batches, now, late = Batches(model, 4, 60), loop.time, 0
        loop.time = lambda: now() + late
        other = asyncio.create_task(batches.in_turn(work, stays))
        await asyncio.to_thread(begun.wait, 60)
        asked = asyncio.create_task(batches(np.array([[1]])))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        late = 61
        may_go_on.set()
        found = (await asyncio.gather(other, asked, return_exceptions=True))[1]
        batches.close()
        return found, model.batches

    refused, batches = asyncio.run(run())
    assert (type(refused), refused.status, refused.kind, batches) == (Refused, 429, "waited", [])


def test_other_work_that_waits_too_long_is_refused():
    async def run():
        batches = Batches(Model(), 4, 0)
        async with batches.between:
            with pytest.raises(Refused, match="not answered in the time") as refused:
                await batches.in_turn(lambda: None, stays)
        batches.close()
        return refused.value.status

    assert asyncio.run(run()) == 429
