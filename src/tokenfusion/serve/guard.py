"""What stands before BentoML: the token, addresses that there are, and BentoML's refusals in our words."""

import hashlib
import hmac
from collections.abc import Callable, Container

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenfusion.serve.measure import REFUSED
from tokenfusion.serve.refusal import Refused, overloaded

HEALTH = frozenset({"/livez", "/readyz", "/healthz"})
SAME = {"/v2/health/live": "/livez", "/v2/health/ready": "/readyz", "/v2/models/{name}/ready": "/readyz"}
"""Other names of health's addresses; the Open Inference Protocol counts all three as health."""
MEASURES = "/metrics"
STATIC = "/static_content/swagger-ui"
"""Beginning of the two files of BentoML's that the page /docs needs."""


class Guard:
    """An ASGI application before another.

    Args:
        app: BentoML's, with our addresses in it.
        known: addresses that there are; BentoML would keep a measure for every other one that is ever asked for.
        pattern: an address with {name} in place of the name of the classifier in use.
        token: gives what requests must bring now; "" for nothing.
        free: addresses that need no token.
    """

    def __init__(
        self,
        app: ASGIApp,
        known: Container[str],
        pattern: Callable[[str], str],
        token: Callable[[], str],
        free: frozenset[str],
    ) -> None:
        self.app, self.known, self.pattern, self.token, self.free = app, known, pattern, token, free | HEALTH

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a websocket, of which there is none
            return await send({"type": "websocket.close", "code": 1000})
        pattern = self.pattern(scope["path"])
        if pattern in SAME:
            scope = {**scope, "path": (pattern := SAME[pattern]), "raw_path": pattern.encode()}
        path, refused = scope["path"], None
        if not (path in HEALTH or path == MEASURES or path.startswith(STATIC) or pattern in self.known):
            refused = Refused(404, path[:200], "no such address", "see /docs")
        elif not self.allowed(scope):
            refused = Refused(401, "Authorization", "not the token of this service", "send Authorization: Bearer TOKEN")
        if refused is not None:
            REFUSED.labels(str(refused.status)).inc()
            return await refused.response()(scope, receive, send)
        return await self.app(scope, receive, in_our_words(scope, receive, send))

    def allowed(self, scope: Scope) -> bool:
        """Whether a request may be answered."""
        path, wanted = scope["path"], self.token()
        if not wanted or path in self.free or path.startswith(STATIC):
            return True
        sent = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, token = sent.partition(b" ")
        same_length = [hashlib.sha256(one).digest() for one in (token.strip(), wanted.encode())]
        return hmac.compare_digest(*same_length) and kind.lower() == b"bearer"


def in_our_words(scope: Scope, receive: Receive, send: Send) -> Send:
    """A `send` that counts refusals, and says those of BentoML and Starlette as we say ours."""
    spoken_for = False

    async def passed_on(message: Message) -> None:
        nonlocal spoken_for
        if message["type"] == "http.response.start" and message["status"] >= 400:
            REFUSED.labels(str(message["status"])).inc()
            if b"x-content-type-options" not in dict(message["headers"]):
                spoken_for = True
                await translated(message["status"], scope).response()(scope, receive, send)
        if not spoken_for:
            await send(message)

    return passed_on


def translated(status: int, scope: Scope) -> Refused:
    """What to say where BentoML or Starlette refused."""
    if status in (429, 503, 504):  # BentoML's bound on requests, and on their time
        return overloaded()
    if status in (404, 405):
        how = f"{scope['method']} {scope['path'][:200]}"
        return Refused(status, how, "this address is not asked like that", "see /docs")
    return Refused(status, "this request", "something in the service failed", "its log says what")
