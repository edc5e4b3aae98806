"""The service: its addresses, and BentoML around them, which counts, bounds and watches over the requests."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bentoml
from bentoml._internal.server.http.traffic import MaxConcurrencyMiddleware, TimeoutMiddleware
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from tokenfusion.serve.holder import Holder
from tokenfusion.serve.limits import InTime, read_images
from tokenfusion.serve.measure import STAGE_SECONDS
from tokenfusion.serve.openapi import openapi
from tokenfusion.serve.protocol import Protocol
from tokenfusion.serve.refusal import MODEL, OURS, Refused, json_response
from tokenfusion.serve.served import Served
from tokenfusion.serve.settings import Settings
from tokenfusion.version import __version__
from tokenfusion_runtime.errors import InputError
from tokenfusion_runtime.image import FORMATS, Pixels
from tokenfusion_runtime.prediction import Answers

PAGE = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js", "/docs": "docs.html", "/docs.js": "docs.js"}
"""Addresses of the page and its parts."""
PAGE_HEADERS = OURS | {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


class Addresses:
    """What is answered where.

    Args:
        holder: the classifier in use.
        settings: limits.
    """

    def __init__(self, holder: Holder, settings: Settings) -> None:
        self.holder, self.settings = holder, settings
        self.protocol = Protocol(holder, settings)

    def app(self) -> Starlette:
        """All of them, and the watch over the classifier."""

        @asynccontextmanager
        async def watched(_: Starlette) -> AsyncIterator[None]:
            watching = asyncio.create_task(self.holder.watch())
            yield
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

        routes = [
            Route("/v1/predict", self.predict, methods=["POST"]),
            Route("/v1/explain", self.explain, methods=["POST"]),
            Route("/v1/model", self.model),
            Route("/openapi.json", self.openapi),
            *self.protocol.routes(),
            *(Route(address, page(name)) for address, name in FILES.items()),
        ]
        in_time = Middleware(InTime, seconds=3 * self.settings.seconds)
        return Starlette(routes=routes, middleware=[in_time], exception_handlers={Refused: refuse}, lifespan=watched)

    async def predict(self, request: Request) -> Response:
        """The answers of `predict`: an object for an image, a list for a form of several."""
        with self.holder.use() as served:
            answers = self.answers(request, served.answers)
            names, several, prepared = await self.read(request, served)
            predictions = await served.predict(names, prepared, answers)
        found = [prediction.to_dict() for prediction in predictions]
        headers = {MODEL: served.sha256}
        if several:
            return json_response(found, headers=headers)
        if reason := predictions[0].error:
            raise unreadable(reason)
        return json_response(found[0], headers=headers)

    async def read(self, request: Request, served: Served) -> tuple[list[str], bool, list[Pixels | str]]:
        """Names of a request's images, whether they came as a form, and their pixels; files are let go of here."""
        with STAGE_SECONDS.labels("read").time():
            given = await read_images(request, self.settings, served.decoders)
        return (
            [name for name, _ in given.images],
            given.several,
            await served.decode([file for _, file in given.images], request.is_disconnected),
        )

    async def explain(self, request: Request) -> Response:
        """Where the classifier looked, as PNG: the branches from left to right, named in a header."""
        branch = query_of(request, {"branch"}).get("branch", "both")
        if branch not in ("cnn", "transformer", "both"):
            raise Refused("option", f"branch={branch}", "not a branch", "give cnn, transformer or both")
        with self.holder.use() as served:
            if served.explain is None:
                reason = served.about["why_not_explained"]
                raise Refused("not_explained", "/v1/explain", reason, "serve a run of one class an image")
            given = await read_images(request, self.settings, served.decoders)
            if len(given.images) > 1:
                raise Refused("too_many", f"{len(given.images)} images", "one is explained at a time", "send one")
            (pixels,) = await served.decode([given.images[0][1]], request.is_disconnected)
            del given
            if isinstance(pixels, str):
                raise unreadable(pixels)
            try:
                names, png = await served.explained(pixels, branch, request.is_disconnected)
            except InputError as error:  # as `explain` says it, of --branch
                reason, _, remedy = str(error).replace("--branch ", "branch=").partition("; ")
                raise Refused("option", f"branch={branch}", reason, remedy or "take another branch") from error
        headers = OURS | {"X-Branches": ", ".join(names), MODEL: served.sha256}
        return Response(png, headers=headers, media_type="image/png")

    async def model(self, _: Request) -> Response:
        """What the classifier is, and what may be asked of it."""
        limits = {
            "bytes": self.settings.max_bytes,
            "images": self.settings.max_images,
            "pixels": self.holder.served.about["max_pixels"],
            "seconds": self.settings.seconds,
            "requests": self.settings.queue,
            "formats": FORMATS,
        }
        versions = {"tokenfusion": __version__, "bentoml": version("bentoml")}
        return json_response(self.holder.served.about | {"limits": limits, "served_by": versions})

    async def openapi(self, _: Request) -> Response:
        """The description of all this that programs read."""
        # which asks for no token, so that the classes of a service that wants one are not told by its examples
        return json_response(
            openapi(("cat", "dog") if self.settings.token_file else self.holder.served.about["classes"])
        )

    def answers(self, request: Request, answers: Callable[[int, float | None], Answers]) -> Answers:
        """How a request wants its answers, by `topk` and `abstain`."""
        options = query_of(request, {"topk", "abstain"})
        return answers(number(options, "topk", int, 5), number(options, "abstain", float, None))


def unreadable(reason: str) -> Refused:
    """What is said of an image that cannot be read."""
    return Refused("unreadable", "the image", reason, "send a whole image file, or the same image in another format")


def query_of(request: Request, known: set[str]) -> dict[str, str]:
    """The options behind the question mark.

    Raises:
        Refused: one is unknown, or given twice.
    """
    options = dict(request.query_params)
    if unknown := sorted(options.keys() - known):
        raise Refused("option", unknown[0], "no option of this address", f"give {' or '.join(sorted(known))}")
    if len(request.query_params.multi_items()) > len(options):
        raise Refused("option", str(request.query_params), "an option is given twice", "give each once")
    return options


def number(options: dict[str, str], name: str, kind: Callable[[str], Any], default: Any) -> Any:
    """An option's number."""
    try:
        return kind(options[name]) if name in options else default
    except ValueError as error:
        value, example = f"{name}={options[name][:50]}", "topk=3" if kind is int else "abstain=0.02"
        raise Refused("option", value, "not a number", f"give one, such as {example}") from error


async def refuse(request: Request, error: Exception) -> Response:
    """What a client gets that is refused."""
    assert isinstance(error, Refused)
    return error.response(request.scope["path"])


def page(name: str) -> Endpoint:
    """What gives out a file of the page."""

    async def give(_: Request) -> Response:
        return FileResponse(PAGE / name, headers=PAGE_HEADERS)

    return give


def service(app: Starlette, settings: Settings, uncounted: Iterable[str]) -> Starlette:
    """BentoML around the addresses: measures, health, the bound on requests, but for those of `uncounted` addresses.

    Their time is for `InTime` to bound.
    """

    bento: Any = bentoml.service(
        name="tokenfusion",
        workers=settings.workers,
        traffic={"max_concurrency": settings.queue},
        logging={"access": {"enabled": False}},
    )(type("Classify", (), {}))
    bento.mount_asgi_app(app)
    around: Starlette = bento.to_asgi(is_main=True)
    around.user_middleware = [one for one in around.user_middleware if one.cls is not TimeoutMiddleware]
    for one in around.user_middleware:
        if one.cls is MaxConcurrencyMiddleware:  # the page is there however many requests are under way
            skipped: Any = one.kwargs["skip_paths"]
            one.kwargs["skip_paths"] = [*skipped, *uncounted]
    return around
