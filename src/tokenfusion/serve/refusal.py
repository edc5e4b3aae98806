"""How a request is refused: a status, and JSON that says the value, the reason and the remedy."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from tokenfusion_runtime.errors import InputError
from tokenfusion_runtime.output import json_text

OURS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
"""Headers of every answer that this package wrote, by which those that BentoML and Starlette write are told apart."""


class Refused(Exception):  # noqa: N818 - says what became of the request
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        value, reason, remedy: what was given, why it will not do, and what to do.
    """

    def __init__(self, status: int, value: str, reason: str, remedy: str) -> None:
        super().__init__(f"{value}: {reason}; {remedy}")
        self.status, self.value, self.reason, self.remedy = status, value, reason, remedy

    @classmethod
    def because(cls, error: InputError) -> "Refused":
        """A refusal in the words of `predict`, "VALUE REASON; REMEDY"."""
        reason, _, remedy = str(error).partition("; ")
        return cls(400, reason.split(" ")[0], reason, remedy or "see /docs")

    def response(self) -> Response:
        """What the client gets."""
        error = {"value": self.value, "reason": self.reason, "remedy": self.remedy}
        retry = {"Retry-After": "1"} if self.status == 429 else {}
        wants = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return json_response({"error": error}, self.status, retry | wants)


def overloaded() -> Refused:
    """What is said where more is asked for than can be answered."""
    reason = "more requests are under way than the service takes"
    return Refused(429, "this request", reason, "ask again after Retry-After seconds")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON, in which what is not printable is spelled out as `predict` does."""
    return Response(json_text(value), status, OURS | dict(headers or {}), "application/json")
