"""`python -m tokenfusion.serve.worker FD`: one process that answers on a socket which the launcher has opened."""

import ctypes
import gc
import os
import signal
import socket
import sys
import time
from pathlib import Path

import uvicorn
from bentoml._internal.context import server_context
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from tokenfusion.serve.connection import connection_for
from tokenfusion.serve.guard import STATIC, Guard
from tokenfusion.serve.holder import Holder, describe_failure
from tokenfusion.serve.limits import MAX_HEADERS
from tokenfusion.serve.refusal import MODEL
from tokenfusion.serve.service import FILES, Addresses, service
from tokenfusion.serve.settings import CAME_UP, CANNOT_START, FOLDER, WAIT, WAITING_CONNECTIONS, Settings
from tokenfusion_runtime.engines import leave_out_converter

SECONDS_KEPT = 75
"""That a connection stays open without a request, longer than clients keep theirs: none asks on a closed one."""

IDLE_CONNECTIONS = 512
"""That may be open besides as many as there may be requests under way; with those files stay below the usual 1,024."""

ACCEPTED_AT_ONCE = 64
"""Connections that asyncio opens before it looks whether there are too many."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl.h."""

SECONDS_BETWEEN_TRIES = 2
"""How often a worker that is to replace another tries to start."""


def application(settings: Settings) -> ASGIApp:
    """All of the service as one ASGI application.

    Raises:
        InputError: the classifier or the token cannot be read.
    """
    holder = Holder(settings)
    addresses = Addresses(holder, settings).app()
    paths = {route.path for route in addresses.routes if hasattr(route, "path")}

    def pattern(path: str) -> str:
        return path.replace(f"/models/{holder.served.about['name']}", "/models/{name}", 1)

    free = frozenset({*FILES, "/openapi.json"})
    bento = service(addresses, settings, free | STATIC)
    app: ASGIApp = Guard(bento, paths, pattern, lambda: holder.token, free, settings.loopback)
    if settings.origins:
        shown = ["Retry-After", "X-Branches", MODEL]
        app = CORSMiddleware(app, settings.origins, allow_methods=["*"], allow_headers=["*"], expose_headers=shown)
    return app


def started(settings: Settings) -> ASGIApp:
    """The application; where it cannot start now, but a worker could before, it is tried until it can."""
    came_up, said = Path(os.environ[FOLDER], CAME_UP), ""
    while True:
        try:
            app = application(settings)
        except Exception as error:  # an engine, or a folder half written, may raise anything
            reason = describe_failure(error)
            if not came_up.exists():
                print(f"error: {reason}", file=sys.stderr, flush=True)
                sys.exit(CANNOT_START)
            if said != (said := reason):
                reason += f"; tried again every {SECONDS_BETWEEN_TRIES} seconds"
                print(f"a worker cannot take the place of one that died: {reason}", file=sys.stderr, flush=True)
            time.sleep(SECONDS_BETWEEN_TRIES)
        else:
            came_up.touch()
            return app


def end_with_launcher() -> None:
    """Have Linux end this process when the launcher is killed, whose port it would hold on to."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Server(uvicorn.Server):
    """uvicorn's, but that as many connections may wait to be accepted as before it took over the socket."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(WAITING_CONNECTIONS)


def main() -> None:
    """Answer until SIGTERM, and then what has been asked."""
    end_with_launcher()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to load anew
    settings = Settings.from_environment()
    time.sleep(float(os.environ.get(WAIT, "0")))
    leave_out_converter()
    app = started(settings)
    gc.collect()
    gc.freeze()  # what is there now stays; looking through it again and again would hold requests up
    server_context.service_name = server_context.bento_name = "tokenfusion"  # in the labels of measures
    config = uvicorn.Config(
        app,
        # of h11, which, other than httptools, bounds the headers
        http=connection_for(settings.seconds, settings.queue + IDLE_CONNECTIONS),
        h11_max_incomplete_event_size=MAX_HEADERS,
        ws="none",
        log_level="error",  # of each bad request its client is told
        backlog=ACCEPTED_AT_ONCE,
        access_log=False,
        server_header=False,
        timeout_keep_alive=SECONDS_KEPT,
        timeout_graceful_shutdown=int(3 * settings.seconds) + 1,
    )
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
