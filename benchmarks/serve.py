"""How fast a service answers beside the runtime alone, what it survives, and whether every answer is right.

    python benchmarks/serve.py EXPORT --images DIR --out benchmarks/results/serve.json --parts throughput latency ...

Loopback only, and each part but `burst` and `memory` lasts some 90 seconds; results of other parts, exports and
machines stay in the JSON. The client (`clients.py`) shares the cores with the service, and what it takes of them is
written beside each figure. Every answer is compared with `predict` of the same image alone, all classes' scores. The
parts:

- `throughput`: clients that ask again as soon as they are answered, in turns with the runtime alone in this process:
  its graph on prepared images, and its `predict` from the same files, at the batch that the service forms.
- `latency`: requests that arrive by chance at 30, 60 and 90 % of that throughput.
- `burst`: 500 connections with 5,000 requests that do not wait, of which those above the queue must be 429; then the
  same with clients that ask again a second later, until all are answered.
- `memory`: 20,000 requests, and what is left when the service has ended.
- `malformed`: 200 requests that are none, slow senders among them.
- `kill`: SIGKILL of a worker under 60 % of the throughput, of one worker and of two.
- `peer`: LitServe with the same classifier, in turns with ours, at the same batch size (`--peer-python`: that has it).

The exports in the results are of models that were trained on 1,200 images of Imagenette for an epoch at 224 pixels
(`tokenfusion_layerwise_tiny`), and for three at 32 (`tokenfusion_layerwise_micro`): enough that scores differ.
"""

import argparse
import asyncio
import base64
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import tokenfusion_runtime
from clients import Judge, Load, judge_of, post
from common import environment
from malformed import ask_all
from tokenfusion.files import write_json

CLIENTS = 64
TOLERANCE = {"fp32": 1e-4, "bf16": 0.02, "int8": 0.02}
"""Largest difference of a score that passes: it depends on the others of a batch by rounding, more in fewer bits."""


@dataclass
class Service:
    """A service that runs.

    Attributes:
        port: where it listens.
        process: the one that was started.
        workers: processes below it.
    """

    port: int
    process: psutil.Process

    @property
    def workers(self) -> list[psutil.Process]:
        return self.process.children(recursive=True)

    def cpu_seconds(self) -> float:
        """What all its processes have taken so far."""
        times = [one.cpu_times() for one in (self.process, *self.workers)]
        return sum(one.user + one.system for one in times)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return bytes(answer.read())

    def batches(self) -> tuple[float, float]:
        """Images and batches so far."""
        measures = self.get("/metrics").decode()
        found = [re.search(rf"^tokenfusion_batch_images_{one}\S* (\S+)$", measures, re.M) for one in ("sum", "count")]
        images, batches = (float(one[1]) if one else 0.0 for one in found)
        return images, batches

    def images_of_a_batch(self, before: tuple[float, float]) -> float:
        """How many there were on average since `batches` gave that."""
        images, batches = (now - one for now, one in zip(self.batches(), before, strict=True))
        return images / max(batches, 1)


@contextmanager
def started(command: list[str], port: int, ready: str, env: dict[str, str]) -> Iterator[Service]:
    """A service from the command to its end; `port` 0: it says which."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            if not port:
                assert process.stdout is not None
                port = int(process.stdout.readline().rpartition(":")[2])
            service = Service(port, psutil.Process(process.pid))
            end = time.monotonic() + 120
            while time.monotonic() < end:
                with suppress(OSError):
                    service.get(ready)
                    break
                time.sleep(0.1)
            yield service
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


class Bench:
    """One exported classifier, images to ask of, and their true answers."""

    def __init__(self, export: Path, images: Path, count: int, peer_python: Path | None) -> None:
        self.export, self.peer_python = export, peer_python
        self.threads = len(os.sched_getaffinity(0))
        self.classifier = tokenfusion_runtime.load(export, threads=self.threads)
        paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg", ".png"))
        self.files = [path.read_bytes() for path in paths[:: max(1, len(paths) // count)][:count]]
        classes = len(self.classifier.classes)
        told = self.classifier.predict(self.files, topk=classes, batch_size=1)
        self.truths = [{row["label"]: row["score"] for row in one.to_dict()["topk"]} for one in told]
        self.judge: Judge = judge_of(self.truths)
        self.requests = [post(f"/v1/predict?topk={classes}", file, "image/jpeg") for file in self.files]
        self.tolerance = TOLERANCE[self.classifier.description["precision"]]

    def serve(self, *options: Any) -> Any:
        command = [sys.executable, "-m", "tokenfusion", "serve", str(self.export), "--port", "0"]
        return started([*command, *map(str, options)], 0, "/readyz", {**os.environ, "OMP_NUM_THREADS": ""})

    def load(self, service: Service) -> Load:
        return Load(service.port, self.requests, self.judge, self.tolerance)

    def measured(self, service: Service, seconds: float, clients: int = CLIENTS) -> dict[str, Any]:
        """A closed load, with the processor's time an image."""
        before = service.cpu_seconds()
        found = asyncio.run(self.load(service).closed(clients, seconds=seconds))
        return found | {"service_cpu_ms_an_image": 1000 * (service.cpu_seconds() - before) / max(found["answered"], 1)}

    def alone(self, batch: int, seconds: float) -> dict[str, float]:
        """The runtime in this process: images a second, and the processor's time an image."""
        files = [self.files[number % len(self.files)] for number in range(batch)]
        pixels = np.stack([self.classifier.prepare(file)[1] for file in files])
        ways: dict[str, Callable[[], Any]] = {
            "graph": lambda: self.classifier.probabilities(pixels),
            "predict": lambda: self.classifier.predict(files, batch_size=batch),
        }
        found = {}
        for name, call in ways.items():
            call()
            began, cpu, images = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - began < seconds:
                call()
                images += batch
            found[f"{name}_images_per_s"] = images / (time.perf_counter() - began)
            found[f"{name}_cpu_ms_an_image"] = 1000 * (time.process_time() - cpu) / images
        return found

    def throughput(self, _: dict[str, Any]) -> dict[str, Any]:
        turns = list[dict[str, Any]]()
        with self.serve() as service:
            self.measured(service, 8)  # BentoML learns what a batch takes
            for _turn in range(3):
                before = service.batches()
                served = self.measured(service, 12)
                batch = service.images_of_a_batch(before)
                turns.append(served | {"images_of_a_batch": batch} | self.alone(round(batch), 5))
        middle = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        return middle | {
            "wrong": sum(turn["wrong"] for turn in turns),
            "share_of_graph": statistics.median(t["images_per_s"] / t["graph_images_per_s"] for t in turns),
            "share_of_predict": statistics.median(t["images_per_s"] / t["predict_images_per_s"] for t in turns),
            "turns": turns,
        }

    def latency(self, row: dict[str, Any]) -> dict[str, Any]:
        whole, found = row["throughput"]["images_per_s"], {}
        with self.serve() as service:
            self.measured(service, 5)
            for share in (30, 60, 90):
                before, cpu = service.batches(), service.cpu_seconds()
                one, _ = asyncio.run(self.load(service).open(share / 100 * whole, 22))
                used = 1000 * (service.cpu_seconds() - cpu) / max(one["answered"], 1)
                batch = service.images_of_a_batch(before)
                found[f"{share} %"] = one | {"images_of_a_batch": batch, "service_cpu_ms_an_image": used}
        return found

    def burst(self, _: dict[str, Any]) -> dict[str, Any]:
        with self.serve() as service:
            self.measured(service, 5)
            hasty = asyncio.run(self.load(service).closed(500, requests=5000))
            patient = asyncio.run(self.load(service).closed(500, requests=5000, patient=True))
        return {"hasty": hasty, "patient": patient}

    def memory(self, _: dict[str, Any]) -> dict[str, Any]:
        rows, seen = list[dict[str, Any]](), set[str]()
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TMPDIR"] = folder
            with self.serve() as service:
                (worker,) = service.workers
                for number in range(11):
                    row = {"requests": 2000 * number, "mb": worker.memory_info().rss / 2**20}
                    rows.append(row | {"handles": worker.num_fds(), "threads": worker.num_threads()})
                    if number < 10:
                        part = asyncio.run(self.load(service).closed(CLIENTS, requests=2000))
                        seen |= {key for key in ("wrong", "lost", "refused_429", "otherwise") if part[key]}
                left = [service.process, *service.workers]
            time.sleep(1)
            files = [path.name for path in Path(folder).iterdir()]
        alive = [one.pid for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        return {"rows": rows, "faults": sorted(seen), "processes_left": len(alive), "files_left": len(files)}

    def malformed(self, _: dict[str, Any]) -> dict[str, Any]:
        with self.serve("--seconds", 5) as service:
            pids = {one.pid for one in service.workers}
            told = asyncio.run(ask_all(service.port, self.files, self.classifier.description["name"]))
            after = asyncio.run(self.load(service).closed(1, requests=20))
            return {
                "requests": sum(sum(counts.values()) for counts in told.values()),
                "told": told,
                "workers_lost": len(pids - {one.pid for one in service.workers}),
                "right_afterwards": after["answered"] - after["wrong"],
            }

    def kill(self, before: dict[str, Any]) -> dict[str, Any]:
        found, rate = {}, 0.6 * before["throughput"]["images_per_s"]
        for workers in (1, 2):
            with self.serve("--workers", workers) as service:
                self.measured(service, 5)
                at = 0.0

                def kill(service: Service = service) -> None:
                    nonlocal at
                    at = time.monotonic()
                    os.kill(service.workers[0].pid, signal.SIGKILL)

                result, tally = asyncio.run(self.load(service).open(rate, 24, kill, again=True))
                ends = sorted([at, *(end for end in tally.ends if end > at)])
                gap = max(later - one for one, later in pairwise(ends))
                found[f"{workers} workers" if workers > 1 else "1 worker"] = result | {"seconds_without_an_answer": gap}
        return found

    def peer(self, before: dict[str, Any]) -> dict[str, Any]:
        assert self.peer_python is not None, "--peer-python PYTHON, one that has litserve"
        classes, found = len(self.classifier.classes), dict[str, list[dict[str, Any]]](ours=[], litserve=[])
        bodies = [json.dumps({"image": base64.b64encode(file).decode()}).encode() for file in self.files]
        theirs = [post("/predict", body, "application/json") for body in bodies]
        rate, late = 0.6 * before["throughput"]["images_per_s"], {}
        script, port = Path(__file__).with_name("serve_peer.py"), 8137
        peer_command = [str(self.peer_python), str(script), str(self.export), str(port), "32", str(classes)]
        env = {**os.environ, "OMP_NUM_THREADS": ""}
        for turn in range(2):
            with self.serve() as service:
                self.measured(service, 5)
                found["ours"].append(self.measured(service, 10))
                if turn:
                    late["ours"], _ = asyncio.run(self.load(service).open(rate, 15))
            with started(peer_command, port, "/health", env) as service:
                ours, self.requests = self.requests, theirs
                self.measured(service, 5)
                found["litserve"].append(self.measured(service, 10))
                if turn:
                    late["litserve"], _ = asyncio.run(self.load(service).open(rate, 15))
                self.requests, left = ours, service.workers
            for one in left:  # which outlive the process that started them
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        version = subprocess.run(
            [self.peer_python, "-c", "import litserve; print(litserve.__version__)"], capture_output=True, text=True
        ).stdout.strip()
        rates = {name: statistics.median(turn["images_per_s"] for turn in turns) for name, turns in found.items()}
        return {"version": version, "images_per_s": rates, "turns": found, "60 %": late}


PARTS = ("throughput", "latency", "burst", "memory", "malformed", "kill", "peer")


def main() -> None:
    """Measure some parts of an export, and put them into the JSON beside the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs to ask of")
    parser.add_argument("--count", type=int, default=200, help="how many of them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, required=True)
    parser.add_argument("--peer-python", type=Path)
    given = parser.parse_args()
    result = json.loads(given.out.read_text()) if given.out.exists() else {"exports": []}
    bench = Bench(given.export, given.images, given.count, given.peer_python)
    said, here = bench.classifier.description, environment()
    key = {name: said[name] for name in ("name", "format", "precision")} | {"img_size": said["preprocess"]["img_size"]}
    key |= {"hardware": here["hardware"]}
    rows = [row for row in result["exports"] if all(row[name] == value for name, value in key.items())]
    row = rows[0] if rows else key | {"measured": {}}
    if not rows:
        result["exports"].append(row)
    row["images"] = {"count": len(bench.files), "mean_bytes": statistics.fmean(map(len, bench.files))}
    for part in given.parts:
        row["measured"][part] = environment()
        row[part] = getattr(bench, part)(row)
        write_json(given.out, result)
        print(part, json.dumps({name: value for name, value in row[part].items() if name != "turns"}, indent=1))


if __name__ == "__main__":
    main()
