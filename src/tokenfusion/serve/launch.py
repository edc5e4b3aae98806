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
import time
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
from tokenfusion.serve.settings import CAME_UP, CANNOT_START, FOLDER, WAIT, WAITING_CONNECTIONS, Settings

SECONDS_BETWEEN_LOOKS = 0.5
"""How often it looks whether a worker has died."""

SECONDS_STEADY = 10
"""A worker that dies within so many seconds of its start is thought to do so again."""

LONGEST_WAIT = 30
"""Seconds between the tries of workers that do."""


def launch(settings: Settings, port: int, say: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT; SIGHUP loads the classifier anew.

    Args:
        settings: of the workers, and the address to listen on.
        port: to listen on; 0 for any that is free.
        say: told the address.

    Returns:
        the exit status.

    Raises:
        InputError: the address is none, or taken.
    """
    with tempfile.TemporaryDirectory(prefix="tokenfusion-serve-") as folder:
        listening = listen(settings.host, port)
        hooks = Hooks(folder, listening)
        watcher = Watcher(
            "workers",
            sys.executable,
            ["-m", "tokenfusion.serve.worker", "$(circus.sockets.http)"],
            numprocesses=settings.workers,
            copy_env=True,
            env=settings.to_environment() | environment(folder),
            use_sockets=True,
            graceful_timeout=4 * settings.seconds,
            hooks={name: (getattr(hooks, name), name != "before_spawn") for name in HOOKS},
        )
        arbiter = Arbiter(
            [watcher],
            endpoint=f"ipc://{folder}/control",
            pubsub_endpoint=f"ipc://{folder}/events",
            sockets=[listening],
            check_delay=SECONDS_BETWEEN_LOOKS,
        )
        heed_signals(arbiter, watcher, Path(folder, CAME_UP))
        say(
            f"listening on http://{f'[{listening.host}]' if ':' in listening.host else listening.host}:{listening.port}"
        )
        if is_open(settings):
            say("whoever reaches this address may ask; --token-file FILE lets in only those who have its token")
        failed = arbiter.start().exception()
        if failed is not None and not hooks.cannot_start:
            raise failed
    return 2 if hooks.cannot_start else 0


class Hooks:
    """What is done as workers come and go.

    Attributes:
        cannot_start: whether a worker ended before any had come up, for which the service ends.
    """

    def __init__(self, folder: str, listening: CircusSocket) -> None:
        self.folder, self.listening, self.cannot_start, self.ends = folder, listening, False, False
        self.began = dict[int, float]()
        self.early, self.said = 0, ""

    @property
    def wait(self) -> float:
        """Seconds that the next worker waits: none after one early death, and twice as long after each further one."""
        return min(LONGEST_WAIT, 2.0 ** min(self.early - 2, 10)) if self.early > 1 else 0.0

    def before_spawn(self, watcher: Watcher, **_: Any) -> bool:
        """Whether there shall be a worker, which is told how long to wait; without one, circus ends."""
        watcher.env[WAIT] = f"{self.wait}"
        return not self.cannot_start

    def after_spawn(self, pid: int, **_: Any) -> bool:
        """Note when it may begin."""
        self.began[pid] = time.monotonic() + self.wait
        return True

    def after_reap(self, process_pid: int, exit_code: int, **_: Any) -> bool:
        """Count a death, and say each way to die once."""
        mark_process_dead(process_pid, self.folder)  # whose requests are under way no more
        lived = time.monotonic() - self.began.pop(process_pid, 0.0)
        if self.ends:
            return True
        how = f"by signal {-exit_code}" if exit_code < 0 else f"with status {exit_code}"
        if not Path(self.folder, CAME_UP).exists():
            self.cannot_start = True
            if exit_code != CANNOT_START:  # who ends so has said why
                print(f"error: a worker ended {how} before it could answer", file=sys.stderr, flush=True)
            return True
        self.early = self.early + 1 if lived < SECONDS_STEADY else 0
        if not self.early or how != self.said:
            remedy = "another takes its place, and what it was answering is lost to its clients, who may ask again"
            print(f"worker {process_pid} ended {how}: {remedy}", file=sys.stderr, flush=True)
        self.said = how
        return True

    def before_stop(self, **_: Any) -> bool:
        """Let who comes now be refused at once, rather than kept waiting."""
        self.ends = True
        self.listening.close()
        return True


HOOKS = ("before_spawn", "after_spawn", "after_reap", "before_stop")


def heed_signals(arbiter: Arbiter, watcher: Watcher, came_up: Path) -> None:
    """SIGTERM and SIGINT end it, SIGHUP reaches workers that are up: circus forgets one that comes while it is busy."""

    def stop() -> None:
        try:
            arbiter.stop()
        except ConflictError:
            arbiter.loop.call_later(0.05, stop)

    def reload() -> None:
        for process in watcher.processes.values() if came_up.exists() else ():
            with suppress(ProcessLookupError, NoSuchProcess):
                process.send_signal(signal.SIGHUP)

    for number, act in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, reload)):
        signal.signal(number, lambda *_, act=act: arbiter.loop.add_callback_from_signal(act))


def is_open(settings: Settings) -> bool:
    """Whether others than this machine's users may ask."""
    return not settings.token_file and not settings.loopback


def listen(host: str, port: int) -> CircusSocket:
    """A socket that listens already, so that a taken port is refused in words."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError as error:
        raise InputError(f"host={host} is no numeric address; give one, such as 127.0.0.1 or 0.0.0.0") from error
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    try:
        listening = CircusSocket("http", host, port, family, backlog=WAITING_CONNECTIONS)
        listening.bind((host, port))
        listening.listen(WAITING_CONNECTIONS)
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
