"""What of a request is read, and where."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from services import form, pictures
from tokenfusion.serve.settings import Settings

limits = pytest.importorskip("tokenfusion.serve.limits", reason="the extra `serve` is not installed")


def test_a_form_is_taken_apart_in_a_thread_and_gives_its_files(monkeypatch):
    from starlette.requests import Request

    files = [("a.png", pictures(1)[0]), ("large", bytes(range(256)) * 2**13)]  # the second is kept on disk meanwhile
    body, headers = form(files)
    used, form_of = [], limits.form_of

    def watched(*arguments):
        used.append(threading.current_thread().name)
        return form_of(*arguments)

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def read():
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        with ThreadPoolExecutor(1, "decoder") as threads:
            request = Request({"type": "http", "method": "POST", "headers": raw}, receive)
            return await limits.read_images(request, Settings(""), threads)

    monkeypatch.setattr(limits, "form_of", watched)
    assert asyncio.run(read()) == limits.Given(tuple(files), several=True)
    assert used == ["decoder_0"]
