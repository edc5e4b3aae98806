"""What a request may take: so many bytes, images and seconds, and no more."""

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from dataclasses import dataclass

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenfusion.serve.refusal import Refused, overloaded
from tokenfusion.serve.settings import Settings

RAW = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""Content types, besides image/*, of a body that is an image; the last is what curl says of any --data-binary."""

MAX_HEADERS = 2**15
"""Bytes of a request's headers and address."""


@dataclass(frozen=True)
class Given:
    """The images of a request.

    Attributes:
        images: a name that the client gave each, "" for none, and its bytes; the name is never taken for a path.
        several: whether they came as a form, which is answered by a list.
    """

    images: tuple[tuple[str, bytes], ...]
    several: bool


async def read_images(request: Request, settings: Settings, threads: Executor) -> Given:
    """The images of a request: its body, or the files of a form, which `threads` take apart.

    Raises:
        Refused: 413 too many bytes or images, 408 it took too long, 415 or 400 it is neither.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        body = await read_body(request, settings)
        return await asyncio.get_running_loop().run_in_executor(threads, form_of, body, request.headers, settings)
    if kind not in RAW and not kind.startswith("image/"):
        raise Refused(
            "wrong_type",
            kind,
            "neither an image nor a form",
            "send an image's bytes, or several images as multipart/form-data",
        )
    return Given((("", await read_body(request, settings)),), several=False)


async def read_body(request: Request, settings: Settings) -> bytes:
    """A request's body, of which no more is held than is allowed.

    Raises:
        Refused: it is too large, comes too slowly, or ends too early.
    """
    limit, parts, size = settings.max_bytes, list[bytes](), 0
    declared = request.headers.get("content-length", "")
    try:
        async with asyncio.timeout(settings.seconds):
            if declared.isdecimal() and int(declared) > limit:
                raise too_large(f"{int(declared):,} bytes", limit)
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large(f"more than {limit:,} bytes", limit)
                parts.append(part)
    except TimeoutError as error:
        reason = f"the request did not arrive within {settings.seconds:g} seconds"
        raise Refused("too_slow", f"{size:,} bytes", reason, "send a smaller image, or over a faster line") from error
    except ClientDisconnect as error:
        raise Refused(
            "cut", f"{size:,} bytes", "the connection ended before the request did", "send it whole"
        ) from error
    return b"".join(parts)


def too_large(value: str, limit: int) -> Refused:
    return Refused(
        "too_large", value, f"more than the {limit:,} bytes that a request may have", "send fewer or smaller images"
    )


def form_of(body: bytes, headers: Headers, settings: Settings) -> Given:
    """The files of a form, in a thread that has no event loop.

    Raises:
        Refused: it is no such form, has no or too many files, or anything else in it.
    """

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    most = settings.max_images
    try:
        parser = MultiPartParser(headers, stream(), max_files=most, max_fields=0, max_part_size=0)
        form = asyncio.run(parser.parse())
    except MultiPartException as error:
        if "Too many files" in error.message:
            reason = f"a request may have {most:,} images"
            raise Refused("too_many", f"more than {most:,} files", reason, "send them in several requests") from error
        if "Too many fields" in error.message or "Part exceeded" in error.message:
            reason = "a field of the form has no file name, so that it is not a file"
            raise Refused("form", "the form", reason, "give images alone, each with a file name") from error
        raise Refused("form", "the form", error.message, "send multipart/form-data, each image with a name") from error
    except Exception as error:  # whatever a form that is cut or forged makes the parser trip over
        raise Refused("form", "the form", f"it cannot be read ({type(error).__name__})", "send it whole") from error
    images = list[tuple[str, bytes]]()
    for _, file in form.multi_items():
        assert isinstance(file, UploadFile)  # for fields are refused
        with file.file as data:
            images.append((file.filename or "", data.read()))
    if not images:
        raise Refused("form", "the form", "there is no image in it", "give one or more files")
    return Given(tuple(images), several=True)


class InTime:
    """An ASGI application that begins to answer within some seconds, or refuses.

    BentoML's own forgets to stop its clock: what a request left, some 5 kB, would stay until its seconds were over.

    Args:
        app: what answers.
        seconds: that it has.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def passed_on(message: Message) -> None:
            if not clock.expired():
                clock.reschedule(None)
            await send(message)

        try:
            async with asyncio.timeout(self.seconds) as clock:
                await self.app(scope, receive, passed_on)
        except TimeoutError:
            if not clock.expired():
                raise
            await overloaded("waited").response(scope["path"])(scope, receive, send)
