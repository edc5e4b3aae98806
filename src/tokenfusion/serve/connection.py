"""uvicorn's connections, but for headers, which it would wait for without end, and for what it refuses in few words."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tokenfusion.serve.measure import REFUSED
from tokenfusion.serve.refusal import Refused


def connection_for(seconds: float) -> type[H11Protocol]:
    """The connections of a service, for uvicorn to make.

    Args:
        seconds: from a connection's opening, or from the first byte of its next request, to the end of the headers.
    """

    class Connection(H11Protocol):
        """Hangs up on who opens a connection, or begins a request, and does not go on."""

        waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.waiting = self.loop.call_later(seconds, self.hang_up)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            between_requests = self.conn.their_state is h11.IDLE
            if self.waiting is None and between_requests and self.conn.trailing_data[0]:
                self.waiting = self.loop.call_later(seconds, self.hang_up)
            elif self.waiting is not None and not between_requests:
                self.wait_no_more()

        def connection_lost(self, exc: Exception | None) -> None:
            self.wait_no_more()
            super().connection_lost(exc)

        def wait_no_more(self) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None

        def hang_up(self) -> None:
            """Close the connection, and say why where something of a request is there."""
            size = len(self.conn.trailing_data[0])
            if not size:
                self.transport.close()
            elif not self.transport.is_closing():
                reason = f"the headers did not end within {seconds:g} seconds"
                self.refuse(Refused(408, f"{size:,} bytes", reason, "send them at once"))

        def send_400_response(self, msg: str) -> None:
            reason = (
                f"it is not HTTP/1.1, or has more than {self.config.h11_max_incomplete_event_size:,} bytes of headers"
            )
            self.refuse(Refused(400, msg.rstrip("."), reason, "send it as the description at /docs says"))

        def refuse(self, refused: Refused) -> None:
            """Answer what never became a request, and close the connection."""
            answer = refused.response()
            headers: list[Any] = [*answer.raw_headers, (b"Connection", b"close")]
            events = (
                h11.Response(status_code=refused.status, headers=headers),
                h11.Data(bytes(answer.body)),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            self.transport.close()
            REFUSED.labels(str(refused.status)).inc()

    return Connection
