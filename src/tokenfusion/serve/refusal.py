"""How a request is refused: a status, and JSON that says the value, the reason and the remedy."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from tokenfusion.serve.measure import REFUSED
from tokenfusion_runtime.errors import InputError
from tokenfusion_runtime.output import json_text

OURS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
"""Headers of every answer that this package wrote, by which those that BentoML and Starlette write are told apart."""

MODEL = "X-Model-SHA256"
"""Header that names the classifier which an answer is from."""

KINDS = {
    "not_http": 400,
    "cut": 400,
    "option": 400,
    "form": 400,
    "tensor": 400,
    "no_token": 401,
    "no_address": 404,
    "no_model": 404,
    "method": 405,
    "too_slow": 408,
    "too_large": 413,
    "too_many": 413,
    "wrong_type": 415,
    "host": 421,
    "unreadable": 422,
    "queue_full": 429,
    "waited": 429,
    "failed": 500,
    "not_explained": 501,
}
"""Why requests are refused, as the measures name it, and the status of HTTP that each gets."""


class Refused(Exception):  # noqa: N818 - says what became of the request
    """A request that is not answered.

    Args:
        kind: one of `KINDS`.
        status: of HTTP, where it is not that of the kind.

    Attributes:
        kind: as the measures count it.
        status: of HTTP.
        value, reason, remedy: what was given, why it will not do, and what to do.
    """

    def __init__(self, kind: str, value: str, reason: str, remedy: str, status: int = 0) -> None:
        super().__init__(f"{value}: {reason}; {remedy}")
        self.kind, self.status = kind, status or KINDS[kind]
        self.value, self.reason, self.remedy = value, reason, remedy

    @classmethod
    def because(cls, error: InputError) -> "Refused":
        """A refusal in the words of `predict`, "VALUE REASON; REMEDY"."""
        reason, _, remedy = str(error).partition("; ")
        return cls("option", reason.split(" ")[0], reason, remedy or "see /docs")

    def response(self, path: str = "") -> Response:
        """What the client gets, which is counted.

        Args:
            path: that it asked for; the Open Inference Protocol, which is at /v2, has errors as a text.
        """
        REFUSED.labels(str(self.status), self.kind).inc()
        parts = {"value": self.value, "reason": self.reason, "remedy": self.remedy}
        retry = {"Retry-After": "1"} if self.status == 429 else {}
        wants = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        protocol = path == "/v2" or path.startswith("/v2/")
        return json_response({"error": str(self) if protocol else parts}, self.status, retry | wants)


def overloaded(kind: str) -> Refused:
    """What is said where more is asked for than can be answered."""
    if kind == "waited":
        reason, remedy = (
            "it was not answered in the time that the service gives a request",
            "ask again, for fewer images",
        )
    else:
        reason, remedy = "more requests are under way than the service takes", "ask again after Retry-After seconds"
    return Refused(kind, "this request", reason, remedy)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON, in which what is not printable is spelled out as `predict` does."""
    return Response(json_text(value), status, OURS | dict(headers or {}), "application/json")
