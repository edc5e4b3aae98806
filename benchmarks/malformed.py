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


def bomb(side: int) -> bytes:
    """A PNG of some kilobytes that unfolds into `side` squared pixels."""
    rows = zlib.compress(bytes((side + 1) * side), 9)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = side.to_bytes(4, "big") * 2
    parts = [chunk(b"IHDR", size + b"\x08\x00\x00\x00\x00"), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def malformed(files: Sequence[bytes], model: str) -> list[bytes]:
    """180 of them, as they are sent."""
    random, found = np.random.default_rng(0), list[bytes]()
    infer = f"/v2/models/{model}/infer"
    for number in range(40):  # cut short
        file = files[number % len(files)]
        found.append(post("/v1/predict", file[: int(random.integers(1, len(file)))], "image/jpeg"))
    for number in range(40):  # bytes in the middle are others
        file = bytearray(files[number % len(files)])
        place = int(random.integers(0, len(file) - 64))
        file[place : place + 64] = random.bytes(64)
        found.append(post("/v1/predict", bytes(file), "image/jpeg"))
    found += [post("/v1/predict", random.bytes(int(size)), "image/png") for size in random.integers(1, 5000, 20)]
    found += [
        post("/v1/predict", b"", kind) for kind in ("", "image/png", "multipart/form-data; boundary=x", "x/y", "/")
    ]
    whole = io.BytesIO()
    Image.new("RGB", (8, 8)).save(whole, "PNG")
    kinds = ("application/json", "text/html", "multipart/form-data", "multipart/form-data; boundary=", "a" * 500)
    found += [post("/v1/predict", whole.getvalue(), kind) for kind in kinds for _ in range(3)]
    large = bomb(12_000)
    found += [post("/v1/predict", large, "image/png") for _ in range(5)]
    form = b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n' + large
    found += [post("/v1/predict", form[:cut], "multipart/form-data; boundary=x") for cut in (10, 30, 70, 400, 10**9)]
    found += [post(infer, text, "application/json") for text in (b"[" * 10**5, b"{", b"null", b"[]", b'{"inputs": 3}')]
    pixels = b'{"inputs": [{"name": "pixels", "datatype": "UINT8", "data": [1e400]}]}'
    found += [post(infer, pixels, "application/json"), post("/v2/models/other/infer", b"{}", "application/json")]
    found += [f"GET /v1/model HTTP/1.1\r\nHost: localhost\r\nX: {'x' * n}\r\n\r\n".encode() for n in (40_000, 10**6)]
    found += [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n\r\n", b"\0" * 100]
    found += [b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: many\r\n\r\n"]
    options = ("topk=0", "topk=x", "abstain=2", "abstain=nan", "path=/etc/passwd", "topk=1&topk=2", "a" * 3000)
    found += [post(f"/v1/predict?{option}", whole.getvalue(), "image/png") for option in options]
    methods = ("PUT", "DELETE", "PATCH", "TRACE", "NONSENSE")
    found += [f"{method} /v1/predict HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for method in methods]
    while len(found) < 200 - SLOW:
        found.append(post(f"/{random.bytes(4).hex()}", b"x", "image/png"))
    return found


async def ask_all(port: int, files: Sequence[bytes], model: str) -> dict[str, int]:
    """How often which status came, "hung up" where none did; slow senders send a byte a second meanwhile."""
    statuses = Counter[str]()

    async def one(request: bytes, slow_from: int | None = None) -> None:
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
        statuses[head[9:12].decode() or "hung up"] += 1
        writer.close()

    slow = [one(post("/v1/predict", files[0], "image/jpeg"), place) for place in (5, 60, 500, 2000) for _ in range(5)]
    assert len(slow) == SLOW

    async def in_turn() -> None:
        for request in malformed(files, model):
            await one(request)

    await asyncio.gather(in_turn(), *slow)
    return dict(sorted(statuses.items()))
