"""Connections end with who sends no HTTP, does not go on, does not read, or says nothing where there are too many."""

import asyncio
import json
import socket
from contextlib import asynccontextmanager, suppress
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


@asynccontextmanager
async def listening(app, seconds=DEADLINE, most=100):
    """Connections alone, before an application; gives their address and those that are open."""
    pytest.importorskip("bentoml", reason="the extra `serve` is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    from tokenfusion.serve.connection import connection_for

    config = uvicorn.Config(app, lifespan="off", log_config=None, h11_max_incomplete_event_size=2**15)
    config.load()
    state, make = uvicorn.server.ServerState(), connection_for(seconds, most)
    server = await asyncio.get_running_loop().create_server(lambda: make(config, state, {}), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname(), state.connections


async def says_nothing(_scope, _receive, send):
    """An application that answers before it has read anything."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


ASKED = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_who_does_not_read_a_long_answer_is_hung_up_on():
    async def answered():
        ended = asyncio.Event()

        async def app(_scope, _receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": bytes(2**25), "more_body": True})
            await send({"type": "http.response.body"})  # which waits until the line has room, or is gone
            ended.set()

        async with listening(app, seconds=0.05) as (address, connections):
            with socket.create_connection(address) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                await asyncio.wait_for(ended.wait(), DEADLINE)
                return len(connections)

    assert asyncio.run(answered()) == 0


def test_what_is_no_http_behind_an_answer_ends_the_connection_without_another_or_a_fault():
    async def received():
        faults = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context["message"]))
        async with listening(says_nothing) as (address, _):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            answered = await reader.readuntil(b"\r\n\r\n")
            writer.write(b"zz\r\n")
            rest = await reader.read()
            writer.close()
        return answered[:12], rest, faults

    assert asyncio.run(received()) == (b"HTTP/1.1 200", b"", [])


@pytest.mark.parametrize("sent", [b"", ASKED])
def test_who_does_not_go_on_is_hung_up_on_whether_it_has_asked_before_or_not(sent):
    async def received():
        async with listening(says_nothing, seconds=0.05) as (address, _):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(sent)
            answered = await reader.readuntil(b"\r\n\r\n") if sent else b""
            writer.write(b"GE" if sent else b"")
            rest = await reader.read()
            writer.close()
        return answered[:12], rest[:12]

    assert asyncio.run(received()) == ((b"HTTP/1.1 200", b"HTTP/1.1 408") if sent else (b"", b""))


def test_of_too_many_connections_the_one_that_has_been_idle_longest_is_closed_and_none_that_is_answered():
    async def found():
        async def app(scope, receive, send):
            if scope["path"] == "/slow":
                under_way.set()
                await receive()
            await says_nothing(scope, receive, send)

        async def answer(one):
            return (await one[0].readuntil(b"\r\n\r\n"))[:12]

        under_way = asyncio.Event()
        async with listening(app, most=2) as (address, connections):
            busy = await asyncio.open_connection(*address)
            busy[1].write(b"POST /slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n")
            await under_way.wait()
            silent = await asyncio.open_connection(*address)
            other = await asyncio.open_connection(*address)
            closed = [await silent[0].read()]
            other[1].write(ASKED)
            answers = [await answer(other)]
            busy[1].write(b"x")
            answers.append(await answer(busy))
            last = await asyncio.open_connection(*address)
            closed.append(await other[0].read())
            for one in (busy, last):
                one[1].write(ASKED)
                answers.append(await answer(one))
            for one in (busy, silent, other, last):
                one[1].close()
            return closed, answers, len(connections)

    assert asyncio.run(asyncio.wait_for(found(), DEADLINE)) == ([b"", b""], 4 * [b"HTTP/1.1 200"], 2)
