"""How fast a service answers, beside the runtime alone, and whether every answer is right; loopback only, bounded.

    python benchmarks/serve.py EXPORT --out benchmarks/results/serve.json [--requests 20000] [--clients 500]

`alone`: images a second of `tokenfusion_runtime` in this process, from the same files, in batches as large as the
service's. `closed`: so many clients that each ask again as soon as they are answered. `burst`: more requests at once
than the service takes, of which the rest must be 429. Every answer is compared with the runtime's, image by image.
"""

import argparse
import asyncio
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

import tokenfusion_runtime
from common import environment
from tokenfusion.files import write_json

TOLERANCE = 1e-3
"""Of scores, which depend on the others of a batch by rounding; more in bf16 than in fp32."""


def pictures(count: int, side: int) -> list[bytes]:
    """JPEGs of noise that its number decides."""
    files = []
    for number in range(count):
        file = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        files.append(file.getvalue())
    return files


async def ask(client: httpx.AsyncClient, file: bytes, truth: dict[str, Any]) -> tuple[int, float, bool]:
    """Status, seconds, and whether the answer is right or a refusal."""
    began = time.perf_counter()
    answer = await client.post("/v1/predict", content=file, headers={"Content-Type": "image/jpeg"})
    seconds = time.perf_counter() - began
    if answer.status_code != 200:
        return answer.status_code, seconds, answer.status_code == 429
    found = answer.json()
    near = abs(found["score"] - truth["score"]) < TOLERANCE
    return 200, seconds, near


async def load(
    url: str, files: list[bytes], truths: list[dict[str, Any]], requests: int, clients: int
) -> dict[str, Any]:
    """So many requests by so many clients, each of which asks again when it is answered."""
    numbers, results = iter(range(requests)), list[tuple[int, float, bool]]()
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client:

        async def one_client() -> None:
            for number in numbers:
                which = number % len(files)
                results.append(await ask(client, files[which], truths[which]))

        began = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(clients)))
        seconds = time.perf_counter() - began
    answered = [one for one in results if one[0] == 200]
    times = sorted(1000 * one[1] for one in answered) or [0.0]
    return {
        "requests": len(results),
        "clients": clients,
        "answered": len(answered),
        "refused_429": sum(one[0] == 429 for one in results),
        "wrong": sum(not one[2] for one in results),
        "images_per_s": len(answered) / seconds,
        "p50_ms": statistics.median(times),
        "p99_ms": times[int(0.99 * (len(times) - 1))],
    }


def held(pid: int) -> dict[str, int]:
    """Memory in MB, and file handles, of a worker."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return {"memory_mb": int(found.group(1)) // 1024 if found else 0, "handles": len(os.listdir(f"/proc/{pid}/fd"))}


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--side", type=int, default=256)
    given = parser.parse_args()
    files = pictures(64, given.side)
    classifier = tokenfusion_runtime.load(given.export)
    truths = [prediction.to_dict() for prediction in classifier.predict(files, batch_size=1)]
    classifier.predict(files, batch_size=32)
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < 5:
        images += len(classifier.predict(files, batch_size=32))
    alone = images / (time.perf_counter() - began)
    command = [sys.executable, "-m", "tokenfusion", "serve", str(given.export), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            while True:
                try:
                    if httpx.get(f"{url}/readyz").status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.1)
            (worker,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
            warm = asyncio.run(load(url, files, truths, min(500, given.requests), 32))
            before = held(worker)
            closed = asyncio.run(load(url, files, truths, given.requests, 64))
            burst = asyncio.run(load(url, files, truths, max(given.requests // 4, 1), given.clients))
            after = held(worker)
        finally:
            process.terminate()
    result = environment() | {"alone_images_per_s": alone, "warm": warm, "closed": closed, "burst": burst}
    result |= {"before": before, "after": after, "exit_status": process.returncode}
    write_json(given.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
