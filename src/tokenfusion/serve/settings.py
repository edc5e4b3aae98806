"""What a service is told when it starts, by which its worker processes are set up alike."""

import ipaddress
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from tokenfusion_runtime.errors import InputError

VARIABLE = "TOKENFUSION_SERVE"
"""Environment variable that hands the settings to the workers."""

CANNOT_START = 3
"""Exit status of a worker that cannot start, where none has before."""

WAIT = "TOKENFUSION_SERVE_WAIT"
"""Environment variable with the seconds that a worker waits before it starts, others having died before it."""

WAITING_CONNECTIONS = 2048
"""That the system keeps for the workers to accept."""

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable with the folder that the workers of a service share."""

CAME_UP = "came-up"
"""File in it that there is once a worker has come up."""


@dataclass(frozen=True)
class Settings:
    """All that a worker needs to know.

    Attributes:
        path: exported folder or run, absolute; links in it are followed anew when it is loaded again.
        workers: processes that answer.
        token_file: file with the bearer token that requests must bring; "" for none.
        origins: web pages of other origins that may use the service; none unless named.
        max_bytes: of a request's body.
        max_pixels: of an image; 0 for as many as the classifier was trained to decode.
        max_images: of a request.
        queue: requests that are answered or wait at once; each worker takes an equal share of them, rounded up.
        seconds: that a request may take to arrive, and then may wait for the model.
        batch_size: images in the model at once.
        host: numeric address that is listened on.
    """

    path: str
    workers: int = 1
    token_file: str = ""
    origins: tuple[str, ...] = ()
    max_bytes: int = 32 * 2**20
    max_pixels: int = 0
    max_images: int = 64
    queue: int = 128
    seconds: float = 60
    batch_size: int = 32
    host: str = "127.0.0.1"

    @classmethod
    def from_environment(cls) -> Self:
        """As the process that started this one has left them."""
        values = json.loads(os.environ[VARIABLE])
        return cls(**values | {"origins": tuple(values["origins"])})

    def to_environment(self) -> dict[str, str]:
        """What a worker reads them from."""
        return {VARIABLE: json.dumps(asdict(self))}

    def read_token(self) -> str:
        """The token that requests must bring; "" for none.

        Raises:
            InputError: its file cannot be read, or is empty.
        """
        if not self.token_file:
            return ""
        try:
            token = Path(self.token_file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise InputError(f"{self.token_file} cannot be read: {error}; give a text file with the token") from error
        if not token:
            raise InputError(f"{self.token_file} is empty and would let anyone in; put a long random word into it")
        return token

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def threads(self) -> int:
        """Cores that a worker has for itself."""
        return max(1, len(os.sched_getaffinity(0)) // self.workers)
