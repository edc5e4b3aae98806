"""uvicorn's connections, but that they wait for nobody without end, are bounded in number, and refuse in our words."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokenfusion.serve.refusal import Refused


def connection_for(seconds: float, most: int) -> type[H11Protocol]:
    """The connections of a service, for uvicorn to make.

    Where there are too many, the one that has been idle longest is closed, so that who asks always gets in: uvicorn's
    own bound, `limit_concurrency`, refuses who asks and keeps who is silent.

    Args:
        seconds: from a connection's opening, or from the first byte of its next request, to the end of the headers;
            from an early answer to the end of the request; and from when an answer is more than the line takes
            to when the client has read most of it.
        most: connections that are open at once, while any of them is idle.
    """
    idle = dict[H11Protocol, None]()  # those without a request under way, in the order in which they became so

    class Connection(H11Protocol):
        """Hangs up on who opens a connection, or begins a request, and does not go on or end it, or does not read."""

        owed = ""
        owing: asyncio.TimerHandle | None = None
        reading: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.wait_for("headers")
            idle[self] = None
            if len(self.connections) > most:
                longest = next(iter(idle))
                del idle[longest]
                longest.transport.abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.take_stock()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.take_stock()

        def take_stock(self) -> None:
            """Note what the client owes, and whether it is idle."""
            self.wait_for(self.what_is_owed())
            if self.cycle is None or self.cycle.response_complete:
                idle.setdefault(self)
            else:
                idle.pop(self, None)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.reading = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            cancel(self.reading)

        def connection_lost(self, exc: Exception | None) -> None:
            self.wait_for("")
            cancel(self.reading)
            idle.pop(self, None)
            super().connection_lost(exc)

        def what_is_owed(self) -> str:
            """What the client has begun and not ended while nothing of ours is under way; "" for nothing."""
            ours, theirs = self.conn.our_state, self.conn.their_state
            if theirs is h11.IDLE and self.conn.trailing_data[0]:
                return "headers"
            return "body" if ours is h11.DONE and theirs is h11.SEND_BODY else ""

        def wait_for(self, owed: str) -> None:
            """Give the client so many seconds, unless it has been given them for the same already."""
            if owed == self.owed:
                return
            self.owed = owed
            cancel(self.owing)
            self.owing = self.loop.call_later(seconds, self.hang_up) if owed else None

        def hang_up(self) -> None:
            """Close the connection, and say why where headers have begun."""
            size = len(self.conn.trailing_data[0])
            if self.owed == "body" or not size:
                self.transport.abort()
            elif not self.transport.is_closing():
                reason = f"the headers did not end within {seconds:g} seconds"
                self.refuse(Refused("too_slow", f"{size:,} bytes", reason, "send them at once"))

        def send_400_response(self, msg: str) -> None:
            reason = (
                f"it is not HTTP/1.1, or has more than {self.config.h11_max_incomplete_event_size:,} bytes of headers"
            )
            self.refuse(Refused("not_http", msg.rstrip("."), reason, "send it as the description at /docs says"))

        def refuse(self, refused: Refused) -> None:
            """Answer what never became a request, unless an answer has begun, and close the connection."""
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.close()
                return
            answer = refused.response()
            headers: list[Any] = [*answer.raw_headers, (b"Connection", b"close")]
            events = (
                h11.Response(status_code=refused.status, headers=headers),
                h11.Data(bytes(answer.body)),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            self.transport.close()

    return Connection


def cancel(timer: asyncio.TimerHandle | None) -> None:
    """Stop a timer, if there is one."""
    if timer is not None:
        timer.cancel()
