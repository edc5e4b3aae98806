"""Shards of tiny pictures, and a server that hands them out over HTTP, not always at once."""

import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(number: int) -> np.ndarray:
    """A picture of noise that its number decides, of a size of its own."""
    return np.random.default_rng(number).integers(0, 256, (8 + number % 3, 9 + number % 4, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_shard(path: Path, numbers: range, labels: str = "cls") -> Path:
    """A tar in the WebDataset layout: picture N is of class N % 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            add(tar, f"{number:04d}.png", png(picture(number)))
            if labels == "cls":
                add(tar, f"{number:04d}.cls", str(number % 3).encode())
            else:
                add(tar, f"{number:04d}.json", json.dumps({"label": "abc"[number % 3], "other": [1]}).encode())
    return path


def write_shards(folder: Path, sizes: dict[str, int], labels: str = "cls") -> Path:
    """Shards by name with so many pictures each, counted on from one to the next."""
    first = 0
    for name, size in sizes.items():
        write_shard(folder / name, range(first, first + size), labels)
        first += size
    return folder


class Server(ThreadingHTTPServer):
    """Serves a folder; fails the first requests of each path, and counts what was sent whole."""

    def __init__(self, folder: Path) -> None:
        self.failures: Counter[str] = Counter()
        self.cut_short: set[str] = set()
        self.sent: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        if not self.fails():
            super().do_HEAD()

    def do_GET(self) -> None:
        if self.fails():
            return
        self.server.sent[self.path] += 1
        if self.path in self.server.cut_short:
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        super().do_GET()

    def fails(self) -> bool:
        if self.server.failures[self.path] <= 0:
            return False
        self.server.failures[self.path] -= 1
        self.send_error(503)
        return True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
