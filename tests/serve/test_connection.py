"""Connections end with who sends no HTTP, does not go on, or does not read."""

import asyncio
import json
import socket
from contextlib import suppress
from http.client import HTTPException

import pytest

from services import DEADLINE, rest_of


def received(connection):
    """Status and JSON of the answer; none where the other side has hung up."""
    try:
        status, text = rest_of(connection)
    except (ConnectionError, HTTPException):
        return None
    return status, json.loads(text)


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/model HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2_000_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_the_next_request_answered(served, sent):
    with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE) as connection:
        with suppress(ConnectionError):  # it may hang up before all of it is sent
            connection.sendall(sent)
        answer = received(connection)
    assert answer is None or (answer[0], set(answer[1]["error"])) == (400, {"value", "reason", "remedy"})
    assert served.ask("/v1/model")[0] == 200


def test_who_does_not_read_a_long_answer_is_hung_up_on():
    """By the connection alone, with the time that it waits at none."""
    pytest.importorskip("bentoml", reason="the extra `serve` is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    from tokenfusion.serve.connection import connection_for

    async def answered():
        ended = asyncio.Event()

        async def app(_scope, _receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": bytes(2**25), "more_body": True})
            await send({"type": "http.response.body"})  # which waits until the line has room, or is gone
            ended.set()

        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        state, loop = uvicorn.server.ServerState(), asyncio.get_running_loop()
        server = await loop.create_server(lambda: connection_for(0.05)(config, state, {}), "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.wait_for(ended.wait(), DEADLINE)
            left = len(state.connections)
        server.close()
        return left

    assert asyncio.run(answered()) == 0


def test_what_is_no_http_behind_an_answer_ends_the_connection_without_another(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert rest_of(connection)[0] == 404
        connection.sendall(b"zz\r\n")
        assert connection.recv(1) == b""


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_who_does_not_go_on_is_hung_up_on_whether_it_has_asked_before_or_not(sent):
    """By the connection alone, with the time that it waits at none."""
    pytest.importorskip("bentoml", reason="the extra `serve` is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    from tokenfusion.serve.connection import connection_for

    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def received():
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        state = uvicorn.server.ServerState()
        loop, make = asyncio.get_running_loop(), connection_for(0.05)
        server = await loop.create_server(lambda: make(config, state, {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(sent)
        answered = await reader.readuntil(b"\r\n\r\n") if sent else b""
        writer.write(b"GE" if sent else b"")
        rest = await reader.read()
        writer.close()
        server.close()
        return answered[:12], rest[:12]

    assert asyncio.run(received()) == ((b"HTTP/1.1 200", b"HTTP/1.1 408") if sent else (b"", b""))
