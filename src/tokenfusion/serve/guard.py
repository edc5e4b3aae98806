"""What stands before BentoML: names of the host, addresses that there are, the token, and its refusals in our words."""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Callable, Container

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenfusion.serve.limits import MAX_HEADERS
from tokenfusion.serve.refusal import Refused, overloaded

HEALTH = frozenset({"/livez", "/readyz", "/healthz"})
SAME = {"/v2/health/live": "/livez", "/v2/health/ready": "/readyz", "/v2/models/{name}/ready": "/readyz"}
"""Other names of health's addresses; the Open Inference Protocol counts all three as health."""
MEASURES = "/metrics"
STATIC = frozenset({"/static_content/swagger-ui.css", "/static_content/swagger-ui-bundle.js"})
"""Files of BentoML's that the page /docs needs."""


class Guard:
    """An ASGI application before another.

    Args:
        app: BentoML's, with our addresses in it.
        known: addresses that there are; BentoML would keep a measure for every other one that is ever asked for.
        pattern: an address with {name} in place of the name of the classifier in use.
        token: gives what requests must bring now; "" for nothing.
        free: addresses that need no token.
        loopback: whether it listens on this machine alone.
    """

    def __init__(
        self,
        app: ASGIApp,
        known: Container[str],
        pattern: Callable[[str], str],
        token: Callable[[], str],
        free: frozenset[str],
        loopback: bool,
    ) -> None:
        self.app, self.known, self.pattern, self.token, self.loopback = app, known, pattern, token, loopback
        self.free = free | HEALTH | STATIC

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a websocket, of which there is none
            return await send({"type": "websocket.close", "code": 1000})
        asked, refused = scope["path"], self.refused(scope)
        if refused is not None:
            return await refused.response(asked)(scope, receive, send)
        if same := SAME.get(self.pattern(asked)):
            scope = {**scope, "path": same, "raw_path": same.encode()}
        return await self.app(scope, receive, in_our_words(asked, scope, receive, send))

    def refused(self, scope: Scope) -> Refused | None:
        """Why a request may not be answered; None where it may."""
        path, host, size = scope["path"], header(scope, b"host"), size_of_headers(scope)
        if size > MAX_HEADERS:  # h11 bounds those alone that come in parts
            reason = f"it has more than {MAX_HEADERS:,} bytes of headers"
            return Refused("not_http", f"{size:,} bytes", reason, "send fewer")
        pattern, wanted = self.pattern(path), self.token()
        if self.loopback and not wanted and not names_loopback(host):  # a page may have its own name lead here
            reason = "not a name of this machine, to which alone the service listens without a token"
            remedy = "ask for localhost; a proxy sends Host: localhost, or the service wants a token"
            return Refused("host", host[:200], reason, remedy)
        if not (path in HEALTH | STATIC or path == MEASURES or pattern in SAME or pattern in self.known):
            return Refused("no_address", path[:200], "no such address", "see /docs")
        if wanted and path not in self.free and pattern not in SAME and not is_bearer(scope, wanted):
            return Refused(
                "no_token", "Authorization", "not the token of this service", "send Authorization: Bearer TOKEN"
            )
        return None


def size_of_headers(scope: Scope) -> int:
    """Bytes of a request's headers and address."""
    address = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
    return address + sum(len(name) + len(value) for name, value in scope["headers"])


def header(scope: Scope, name: bytes) -> str:
    """A request's header; "" where it has none."""
    return bytes(dict(scope["headers"]).get(name, b"")).decode("latin-1")


def names_loopback(host: str) -> bool:
    """Whether a Host header names this machine by itself; who sends none is no browser, which alone is fooled.

    Any port will do: where one is forwarded, clients name the other end's.
    """
    found = re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d*)?", host)
    if not host or (found and found[1].lower() == "localhost"):
        return True
    try:
        return found is not None and ipaddress.ip_address(found[1].strip("[]")).is_loopback
    except ValueError:
        return False


def is_bearer(scope: Scope, wanted: str) -> bool:
    """Whether a request brings the token, compared in a time that says nothing of it."""
    kind, _, token = header(scope, b"authorization").partition(" ")
    same_length = [hashlib.sha256(one).digest() for one in (token.strip().encode("latin-1"), wanted.encode())]
    return hmac.compare_digest(*same_length) and kind.lower() == "bearer"


def in_our_words(asked: str, scope: Scope, receive: Receive, send: Send) -> Send:
    """A `send` that says refusals of BentoML and Starlette as we say ours; `asked` is the path as the client has it."""
    spoken_for = False

    async def passed_on(message: Message) -> None:
        nonlocal spoken_for
        if message["type"] == "http.response.start" and message["status"] >= 400:
            headers = dict(message["headers"])
            if b"x-content-type-options" not in headers:
                spoken_for = True
                response = translated(message["status"], scope["method"], asked).response(asked)
                if allow := headers.get(b"allow"):
                    response.headers["Allow"] = allow.decode()
                await response(scope, receive, send)
        if not spoken_for:
            await send(message)

    return passed_on


def translated(status: int, method: str, path: str) -> Refused:
    """What to say where BentoML or Starlette refused."""
    if status in (429, 503, 504):  # BentoML's bound on requests, and on their time
        return overloaded("queue_full" if status == 429 else "waited")
    if status in (404, 405):
        kind, how = "no_address" if status == 404 else "method", f"{method} {path[:200]}"
        return Refused(kind, how, "this address is not asked like that", "see /docs")
    return Refused("failed", "this request", "something in the service failed", "its log says what", status)
