"""200 requests that a service must refuse without failing: cut, forged, bombs, empty, too long, too slow."""

import asyncio
import io
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from clients import post

SLOW = 20
OVERWRITTEN = "64 bytes overwritten"
"""Of a JPEG, which a decoder may well read: what is told of it is then what `predict` tells of the same file."""


def bomb(side: int) -> bytes:
    """A PNG of some kilobytes that unfolds into `side` squared pixels."""
    rows = zlib.compress(bytes((side + 1) * side), 9)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = side.to_bytes(4, "big") * 2
    parts = [chunk(b"IHDR", size + b"\x08\x00\x00\x00\x00"), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def malformed(files: Sequence[bytes], model: str) -> dict[str, list[bytes]]:
    """180 of them by what is wrong with them, as they are sent."""
    random, infer = np.random.default_rng(0), f"/v2/models/{model}/infer"
    found = dict[str, list[bytes]]()

    def ask(kind: str, body: bytes, content_type: str, path: str = "/v1/predict") -> None:
        found.setdefault(kind, []).append(post(path, body, content_type))

    for number in range(40):
        file = files[number % len(files)]
        ask("cut short", file[: int(random.integers(1, len(file)))], "image/jpeg")
    for number in range(40):
        file = bytearray(files[number % len(files)])
        place = int(random.integers(0, len(file) - 64))
        file[place : place + 64] = random.bytes(64)
        ask(OVERWRITTEN, bytes(file), "image/jpeg")
    for size in random.integers(1, 5000, 20):
        ask("random bytes", random.bytes(int(size)), "image/png")
    for kind in ("", "image/png", "multipart/form-data; boundary=x", "x/y", "/"):
        ask("empty", b"", kind)
    whole = io.BytesIO()
    Image.new("RGB", (8, 8)).save(whole, "PNG")
    for kind in ("application/json", "text/html", "multipart/form-data", "multipart/form-data; boundary=", "a" * 500):
        for _ in range(3):
            ask("an image called something else", whole.getvalue(), kind)
    large = bomb(12_000)
    form = b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n' + large
    for _ in range(5):
        ask("bomb", large, "image/png")
    for cut in (10, 30, 70, 400, 10**9):
        ask("form cut short", form[:cut], "multipart/form-data; boundary=x")
    pixels = b'{"inputs": [{"name": "pixels", "datatype": "UINT8", "data": [1e400]}]}'
    for text in (b"[" * 10**5, b"{", b"null", b"[]", b'{"inputs": 3}', pixels):
        ask("JSON", text, "application/json", infer)
    ask("JSON", b"{}", "application/json", "/v2/models/other/infer")
    found["headers too long"] = [
        f"GET /v1/model HTTP/1.1\r\nHost: localhost\r\nX: {'x' * n}\r\n\r\n".encode() for n in (40_000, 10**6)
    ]
    no_length = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: many\r\n\r\n"
    handshake = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    found["no HTTP"] = [handshake, b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n\r\n", b"\0" * 100, no_length]
    for option in ("topk=0", "topk=x", "abstain=2", "abstain=nan", "path=/etc/passwd", "topk=1&topk=2", "a" * 3000):
        ask("options", whole.getvalue(), "image/png", f"/v1/predict?{option}")
    methods = ("PUT", "DELETE", "PATCH", "TRACE", "NONSENSE")
    found["methods"] = [f"{method} /v1/predict HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for method in methods]
    for _ in range(200 - SLOW - sum(map(len, found.values()))):
        ask("addresses", b"x", "image/png", f"/{random.bytes(4).hex()}")
    return found


async def ask_all(port: int, files: Sequence[bytes], model: str) -> dict[str, dict[str, int]]:
    """How often each kind was told which status, "hung up" where none was; slow senders send a byte a second
    meanwhile."""
    statuses = dict[str, Counter[str]]()

    async def one(kind: str, request: bytes, slow_from: int | None = None) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def send() -> None:
            writer.write(request[:slow_from])
            for place in range(len(request) if slow_from is None else slow_from, len(request)):
                await asyncio.sleep(1)
                writer.write(request[place : place + 1])

        sending = asyncio.create_task(send())
        try:
            head = await asyncio.wait_for(reader.read(12), 60)
        except (OSError, TimeoutError):
            head = b""
        sending.cancel()
        statuses.setdefault(kind, Counter())[head[9:12].decode() or "hung up"] += 1
        writer.close()

    whole = post("/v1/predict", files[0], "image/jpeg")
    slow = [one("sent slowly", whole, place) for place in (5, 60, 500, 2000) for _ in range(5)]
    assert len(slow) == SLOW

    async def in_turn() -> None:
        for kind, requests in malformed(files, model).items():
            for request in requests:
                await one(kind, request)

    await asyncio.gather(in_turn(), *slow)
    return {kind: dict(sorted(counts.items())) for kind, counts in statuses.items()}
