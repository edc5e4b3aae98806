"""A service of its own process for tests, and a small exported classifier that it takes no training to make."""

import contextlib
import hashlib
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tokenfusion_runtime

NAMES = ["red", "green", "blue"]
DEADLINE = 120
"""Seconds in which a service is ready or gone, however busy the machine."""


def write_export(folder: Path, seed: int = 0) -> Path:
    """An exported folder whose graph multiplies the pixels by random numbers and takes a softmax."""
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(seed).normal(0, 0.002, (3 * 8 * 8, len(NAMES))).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 3, 8, 8])
    probabilities = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["B", len(NAMES)])
    graph = helper.make_graph(nodes, "g", [images], [probabilities], [numpy_helper.from_array(weights, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    preprocess = {"img_size": [8, 8], "in_chans": 3, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    errors = [{"images": 200, "ranks": [150], "scores": [0.9999]}]  # by which 1 % cannot be promised
    description = {
        "export_format": 1, "format": "onnx", "precision": "fp32", "batch": None, "name": "tiny", "classes": NAMES,
        "preprocess": preprocess | {"interpolation": "bilinear"}, "max_pixels": 10**8, "multi_label": False,
        "thresholds": [], "temperature": 1.0, "surest_errors": errors, "mistaken": {"red": {"blue": 0.2}},
        "weights_sha256": "", "tokenfusion": "0.1.0", "license": "", "files": ["model.onnx"],
        "graph_sha256": hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest(), "parity": {"n": 359},
        "forced": False, "faults": [],
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(description))
    return folder


def pictures(count: int) -> list[bytes]:
    """Image files of several sizes and formats."""
    files = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (9 + number % 5, 8 + number % 7, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, ("PNG", "JPEG", "BMP")[number % 3])
        files.append(file.getvalue())
    return files


def answers_of(folder: Path, files: list[bytes], **options: Any) -> list[dict[str, Any]]:
    """What the runtime says of image files, each alone."""
    classifier = tokenfusion_runtime.load(folder, threads=1)
    return [classifier.predict(file, **options)[0].to_dict() for file in files]


def start(*words: Any, port: int = 0) -> "subprocess.Popen[str]":
    """The command, in a process of its own, on any free port or a given one."""
    command = [sys.executable, "-m", "tokenfusion", "serve", *map(str, words), "--port", str(port)]
    paths = os.pathsep.join([str(Path(tokenfusion_runtime.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


class Service:
    """A service that runs.

    Attributes:
        process: that was started, which watches over the workers.
        port: where it listens.
    """

    def __init__(self, *words: Any, port: int = 0) -> None:
        self.process = start(*words, port=port)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on http://"), line + self.process.communicate()[1]
        self.port = int(line.rpartition(":")[2])
        self.wait_until(lambda: self.ask("/readyz")[0] == 200)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)

    def ask(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, method: str = ""
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers by their names in small letters, and body of the answer."""
        with contextlib.closing(self.connect()) as connection:
            connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def predict(self, body: bytes, query: str = "") -> dict[str, Any]:
        """The answer for one image."""
        status, _, text = self.ask(f"/v1/predict{query}", body)
        assert status == 200, text
        return json.loads(text)

    def send(self, body: bytes, headers: dict[str, str] | None = None) -> socket.socket:
        """Ask with the body kept back: the service says whether it wants it."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE)
        own = {"Host": "localhost", "Content-Length": str(len(body)), "Expect": "100-continue"} | (headers or {})
        lines = ["POST /v1/predict HTTP/1.1", *(f"{name}: {value}" for name, value in own.items()), "", ""]
        connection.sendall("\r\n".join(lines).encode())
        return connection

    def begin(self, body: bytes, headers: dict[str, str] | None = None) -> socket.socket:
        """Ask with the last byte of the body kept back, once the service is reading it: it says so."""
        connection = self.send(body, headers)
        assert connection.recv(25).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body[:-1])
        return connection

    def workers(self) -> set[int]:
        """Processes that answer."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return set(map(int, children.split()))

    def wait_until(self, happened: Any) -> None:
        """Wait until something is so; a service that does not answer meanwhile is waited for too."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if happened():
                    return
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.05)
        raise AssertionError("it has not happened in time")

    def wait_for_words(self, words: str) -> str:
        """The next line of standard error that has them."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if words in line:
                return line
        raise AssertionError(f"it ended without saying {words}")

    def stop(self) -> tuple[int, str]:
        """End it as a supervisor would; exit status and what it said on standard error."""
        self.process.terminate()
        _, errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, errors


@contextlib.contextmanager
def service(*words: Any, port: int = 0) -> Iterator[Service]:
    """A service while a test, or a module of tests, goes on."""
    pytest.importorskip("bentoml", reason="the extra `serve` is not installed")
    running = Service(*words, port=port)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


class Restarted:
    """A service that several tests share; one that has ended since is started again, on the same port.

    Args:
        words: of the command.
    """

    def __init__(self, *words: Any) -> None:
        pytest.importorskip("bentoml", reason="the extra `serve` is not installed")
        self.words = words
        self.latest: Service | None = None

    def __call__(self) -> Service:
        if self.latest is None or self.latest.process.poll() is not None:
            self.latest = Service(*self.words, port=self.latest.port if self.latest else 0)
        return self.latest

    def end(self) -> None:
        if self.latest is not None and self.latest.process.poll() is None:
            self.latest.stop()


def rest_of(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of the answer on a connection that was begun."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, answer.read()


def form(files: list[tuple[str, bytes]]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a form of files."""
    parts = []
    for name, data in files:
        head = f'--edge\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join([*parts, b"--edge--\r\n"]), {"Content-Type": "multipart/form-data; boundary=edge"}
