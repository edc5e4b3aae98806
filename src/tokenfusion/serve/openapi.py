"""The description of the service that programs read: OpenAPI 3.0, of which /docs lets people give several files."""

from collections.abc import Sequence
from typing import Any

from tokenfusion.version import __version__

IMAGE = {"schema": {"type": "string", "format": "binary"}}
FORM = {
    "schema": {
        "type": "object",
        "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
    }
}
REFUSALS = {
    400: "an option or a form that cannot be understood",
    401: "the token is missing, or another one",
    404: "no such address",
    405: "the address is not asked by this method",
    408: "the request took too long to arrive",
    413: "too many bytes or images",
    415: "neither an image nor a form",
    421: "a service without a token that listens on this machine alone is asked by another name",
    422: "an image that cannot be read",
    429: "more requests than the service takes; ask again after Retry-After seconds",
    501: "where the model looked cannot be seen",
}

REASONS = {"type": "object", "properties": {name: {"type": "string"} for name in ("value", "reason", "remedy")}}
"""What the JSON of a refusal says."""

ANY_JSON = {"application/json": {"schema": {"type": "object"}}}
TENSORS = {**ANY_JSON, "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
"""Of the classifier, as GET /v1/model says it."""

PROTOCOL = (
    "The paths below /v2 are those of the [Open Inference Protocol]"
    "(https://github.com/kserve/open-inference-protocol); GET /v2/models/NAME says what the classifier takes and gives."
)


def openapi(classes: Sequence[str]) -> dict[str, Any]:
    """All addresses, with examples that name this classifier's classes."""
    one, other = classes[0], classes[-1]
    best = [{"label": one, "score": 0.91}, {"label": other, "score": 0.05}]
    answer = {"path": "", "label": one, "score": 0.91, "topk": best}
    several = [answer | {"path": "a.jpg"}, {"path": "b.jpg", "error": "damaged image: image file is truncated"}]
    unsure = answer | {"label": None}
    examples = {"one": {"value": answer}, "unsure": {"value": unsure}, "several": {"value": several}}
    topk = parameter("topk", "integer", "how many classes to name", 5)
    abstain = parameter(
        "abstain", "number", "largest share of wrong answers, such as 0.02; where unsure, label is null"
    )
    branch = parameter("branch", "string", "cnn, transformer or both", "both")
    predict = operation("Classify an image, or several", {"application/json": {"examples": examples}})
    explain = operation("Where the model looked, as PNG; 501 where it cannot be seen", {"image/png": IMAGE})
    body = {"required": True, "content": {"image/*": IMAGE, "multipart/form-data": FORM}}
    about = {"application/json": {"example": {"name": "tokenfusion_early_tiny", "classes": list(classes[:10])}}}
    return {
        "openapi": "3.0.3",
        "info": {"title": "tokenfusion", "version": __version__, "description": PROTOCOL},
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Refusal": {"type": "object", "properties": {"error": REASONS}},
                "ProtocolRefusal": {"type": "object", "properties": {"error": {"type": "string"}}},
            },
        },
        "security": [{}, {"token": []}],
        "paths": {
            "/v1/predict": {"post": predict | {"requestBody": body, "parameters": [topk, abstain]}},
            "/v1/explain": {"post": explain | {"requestBody": body, "parameters": [branch]}},
            "/v1/model": {"get": operation("What the classifier is, and the limits", about)},
            "/metrics": {"get": operation("Measures for Prometheus", {"text/plain": {}})},
            "/livez": health("200 while the process lives"),
            "/readyz": health("200 when it answers"),
            "/healthz": health("200 when it answers"),
            "/v2": {"get": operation("What the server is", ANY_JSON, "ProtocolRefusal")},
            "/v2/health/live": health("200 while the process lives"),
            "/v2/health/ready": health("200 when it answers"),
            "/v2/models/{name}": {
                "parameters": [NAME],
                "get": operation("Inputs and outputs", ANY_JSON, "ProtocolRefusal"),
            },
            "/v2/models/{name}/ready": {"parameters": [NAME]} | health("200 when it answers"),
            "/v2/models/{name}/infer": {
                "parameters": [NAME],
                "post": operation("Probabilities and labels", TENSORS, "ProtocolRefusal")
                | {"requestBody": {"required": True, "content": TENSORS}},
            },
        },
    }


def operation(summary: str, content: dict[str, Any], refusal: str = "Refusal") -> dict[str, Any]:
    """An address, its answer and its refusals."""
    refused = {"application/json": {"schema": {"$ref": f"#/components/schemas/{refusal}"}}}
    refusals = {str(status): {"description": why, "content": refused} for status, why in REFUSALS.items()}
    return {"summary": summary, "responses": {"200": {"description": "the answer", "content": content}} | refusals}


def health(summary: str) -> dict[str, Any]:
    """An address of health, which needs no token."""
    return {"get": operation(summary, {}) | {"security": []}}


def parameter(name: str, kind: str, what: str, default: Any = None) -> dict[str, Any]:
    """An option behind the question mark."""
    schema = {"type": kind} | ({} if default is None else {"default": default})
    return {"name": name, "in": "query", "description": what, "schema": schema}
