"""The process that watches over the workers: circus, which is BentoML's, as BentoML's own launcher does not let it be.

`bentoml serve` replaces a dead worker only every ten seconds, and in a container never; restarts all of them at SIGHUP;
opens circus's control, which asks for no password, on a TCP port; and reports to its maker. Here the same processes are
set up otherwise.
"""

import ipaddress
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from circus.arbiter import Arbiter
from circus.exc import ConflictError
from circus.sockets import CircusSocket
from circus.watcher import Watcher
from prometheus_client.multiprocess import mark_process_dead
from psutil import NoSuchProcess

from tokenfusion.errors import InputError
from tokenfusion.serve.settings import CAME_UP, CANNOT_START, FOLDER, Settings

SECONDS_BETWEEN_LOOKS = 0.5
"""How often it looks whether a worker has died."""


def launch(settings: Settings, host: str, port: int, say: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT; SIGHUP loads the classifier anew.

    Args:
        settings: of the workers.
        host: numeric address to listen on.
        port: to listen on; 0 for any that is free.
        say: told the address.

    Returns:
        the exit status.

    Raises:
        InputError: the address is none, or taken.
    """
    with tempfile.TemporaryDirectory(prefix="tokenfusion-serve-") as folder:
        listening = listen(host, port)
        cannot_start = False

        def reaped(process_pid: int, exit_code: int, **_: Any) -> bool:
            nonlocal cannot_start
            mark_process_dead(process_pid, folder)  # whose requests are under way no more
            cannot_start |= exit_code == CANNOT_START and not Path(folder, CAME_UP).exists()
            return True

        def spawning(**_: Any) -> bool:
            return not cannot_start  # without a worker, circus ends

        def stopping(**_: Any) -> bool:
            listening.close()  # so that who comes now is refused at once, rather than kept waiting
            return True

        watcher = Watcher(
            "workers",
            sys.executable,
            ["-m", "tokenfusion.serve.worker", "$(circus.sockets.http)"],
            numprocesses=settings.workers,
            copy_env=True,
            env=settings.to_environment() | environment(folder),
            use_sockets=True,
            graceful_timeout=4 * settings.seconds,
            hooks={"after_reap": (reaped, True), "before_spawn": (spawning, False), "before_stop": (stopping, True)},
        )
        arbiter = Arbiter(
            [watcher],
            endpoint=f"ipc://{folder}/control",
            pubsub_endpoint=f"ipc://{folder}/events",
            sockets=[listening],
            check_delay=SECONDS_BETWEEN_LOOKS,
        )
        heed_signals(arbiter, watcher)
        say(f"listening on http://{f'[{listening.host}]' if ':' in host else listening.host}:{listening.port}")
        if is_open(listening.host, settings):
            say("whoever reaches this address may ask; --token-file FILE lets in only those who have its token")
        failed = arbiter.start().exception()
        if failed is not None and not cannot_start:
            raise failed
    return 2 if cannot_start else 0


def heed_signals(arbiter: Arbiter, watcher: Watcher) -> None:
    """SIGTERM and SIGINT end it, SIGHUP reaches the workers: circus forgets a signal that comes while it is busy."""

    def stop() -> None:
        try:
            arbiter.stop()
        except ConflictError:
            arbiter.loop.call_later(0.05, stop)

    def reload() -> None:
        for process in watcher.processes.values():
            with suppress(ProcessLookupError, NoSuchProcess):
                process.send_signal(signal.SIGHUP)

    for number, act in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, reload)):
        signal.signal(number, lambda *_, act=act: arbiter.loop.add_callback_from_signal(act))


def is_open(host: str, settings: Settings) -> bool:
    """Whether others than this machine's users may ask, given a numeric address."""
    return not settings.token_file and not ipaddress.ip_address(host).is_loopback


def listen(host: str, port: int) -> CircusSocket:
    """A socket that listens already, so that a taken port is refused in words."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError as error:
        raise InputError(f"host={host} is no numeric address; give one, such as 127.0.0.1 or 0.0.0.0") from error
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    try:
        listening = CircusSocket("http", host, port, family, backlog=2048)
        listening.bind((host, port))
        listening.listen(2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{host}:{port} cannot be listened on: {reason}; give another --host or --port") from error
    listening.host, listening.port = listening.getsockname()[:2]
    listening.bind_and_listen = lambda: None  # circus would do it again
    return listening


def environment(folder: str) -> dict[str, str]:
    """What workers are told besides their settings: where measures are shared, and to tell nobody else anything."""
    return {
        FOLDER: folder,
        "BENTOML_HOME": folder,
        "BENTOML_DO_NOT_TRACK": "True",
        "OTEL_SDK_DISABLED": "true",  # BentoML would trace each request four times over, for nobody
        "PYTHONSAFEPATH": "1",  # no module of the folder that the command was given in
    }
