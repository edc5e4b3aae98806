"""A request begins to be answered in time or is refused, and leaves nothing behind."""

import asyncio
import gc

import httpx
import pytest

from services import write_export
from tokenfusion.serve.limits import InTime
from tokenfusion.serve.settings import Settings

SECONDS = 0.05


def asked(app):
    """The messages that an application sends for a request of an address."""
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(InTime(app, SECONDS)({"type": "http", "path": "/v1/predict"}, None, send))
    return sent


def test_who_has_no_answer_in_time_is_refused():
    async def never(_scope, _receive, _send):
        await asyncio.Event().wait()

    start, body = asked(never)
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (429, b"1")
    assert b"not answered in the time" in body["body"]


def test_an_answer_that_has_begun_is_not_cut():
    async def slow(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.wait_for(asyncio.Event().wait(), 3 * SECONDS)

    with pytest.raises(TimeoutError):  # the application's own, which is none of this clock's business
        asked(slow)


def test_nothing_of_a_request_stays_when_it_is_answered(tmp_path):
    application = pytest.importorskip("tokenfusion.serve.worker").application

    async def left():
        app = application(Settings(str(write_export(tmp_path / "export"))))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            for _ in range(5):
                assert (await client.get("/v1/model")).status_code == 200
        return [one for one in gc.get_objects() if isinstance(one, asyncio.TimerHandle) and not one.cancelled()]

    assert asyncio.run(left()) == []
