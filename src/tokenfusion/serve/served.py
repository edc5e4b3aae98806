"""The classifier that a worker answers by: an exported folder without torch, or a run."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tokenfusion.serve.about import calibration
from tokenfusion.serve.batching import Batches
from tokenfusion.serve.measure import STAGE_SECONDS, UNREADABLE
from tokenfusion.serve.refusal import Refused
from tokenfusion.serve.settings import Settings
from tokenfusion_runtime.classifier import ExportedClassifier, load
from tokenfusion_runtime.description import read_model_json
from tokenfusion_runtime.errors import InputError
from tokenfusion_runtime.image import Pixels
from tokenfusion_runtime.prediction import Answers, Floats, Prediction

Explain = Callable[[Pixels, str], tuple[list[str], bytes]]


class Model(Protocol):
    """What an exported classifier and a run have in common."""

    @property
    def classes(self) -> tuple[str, ...]: ...
    def prepare(self, image: bytes) -> tuple[str, Pixels | str]: ...
    def probabilities(self, images: Pixels) -> Floats: ...
    def answers(self, topk: int, abstain: float | None) -> Answers: ...


class Served:
    """A classifier that is loaded, and the queue before it.

    Attributes:
        model: what answers.
        about: what `GET /v1/model` says of it.
        explain: gives branches and a PNG of (an image's pixels, branch); None where the artefact cannot.
        users: requests that are using it.
        at_once: images of one request that are decoded at a time: a thread is left to others.
    """

    def __init__(self, model: Model, about: dict[str, Any], settings: Settings, explain: Explain | None = None) -> None:
        self.model, self.about, self.explain, self.users = model, about, explain, 0
        self.batches = Batches(model.probabilities, settings.batch_size, settings.seconds)
        self.decoders, self.at_once = ThreadPoolExecutor(settings.threads, "decoder"), max(1, settings.threads - 1)

    @property
    def sha256(self) -> str:
        """Of the graph, or of a run's weights and description: which classifier an answer is from."""
        return str(self.about["sha256"])

    def answers(self, topk: int = 5, abstain: float | None = None) -> Answers:
        """How probabilities become predictions.

        Raises:
            Refused: these numbers mean nothing.
        """
        try:
            return self.model.answers(min(topk, len(self.model.classes)), abstain)
        except InputError as error:
            raise Refused.because(error) from error

    async def predict(
        self, names: Sequence[str], prepared: Sequence[Pixels | str], answers: Answers
    ) -> list[Prediction]:
        """Predictions of what `decode` gave, in order; of an image that cannot be read, why."""
        readable = [pixels for pixels in prepared if not isinstance(pixels, str)]
        scores = await self.batches(np.stack(readable)) if readable else ()
        return list(answers.predictions(zip(names, prepared, strict=True), scores))

    async def decode(self, files: Sequence[bytes], has_gone: Callable[[], Awaitable[bool]]) -> list[Pixels | str]:
        """The prepared pixels of a request's image files, or why there are none.

        A few at a time, so that large ones of one request leave threads to others'; none for a client that has gone.

        Raises:
            Refused: the client has gone.
        """
        began, loop = time.perf_counter(), asyncio.get_running_loop()
        few = asyncio.Semaphore(self.at_once)

        async def prepare(file: bytes) -> Pixels | str:
            async with few:
                if await has_gone():
                    reason = "the connection ended before its images were decoded"
                    raise Refused("cut", "this request", reason, "ask again")
                return (await loop.run_in_executor(self.decoders, self.model.prepare, file))[1]

        prepared = await asyncio.gather(*map(prepare, files))
        STAGE_SECONDS.labels("decode").observe(time.perf_counter() - began)
        UNREADABLE.inc(sum(isinstance(pixels, str) for pixels in prepared))
        return prepared

    async def explained(
        self, pixels: Pixels, branch: str, has_gone: Callable[[], Awaitable[bool]]
    ) -> tuple[list[str], bytes]:
        """Branches and a PNG of where it looked in an image, where the artefact can say and the client is still there.

        Raises:
            Refused: it has waited too long, or the client has gone.
        """

        explain = self.explain
        assert explain is not None

        def work() -> tuple[list[str], bytes]:
            with STAGE_SECONDS.labels("explain").time():
                return explain(pixels, branch)

        return await self.batches.in_turn(work, has_gone)

    def close(self) -> None:
        """End its threads and its queue, when no request uses it any more."""
        self.batches.close()
        self.decoders.shutdown(wait=False)


def open_served(settings: Settings) -> Served:
    """Load what the settings name.

    Raises:
        InputError: it is neither an exported folder nor a finished run, or cannot be loaded.
    """
    path = Path(settings.path).resolve()  # a link may lead elsewhere before all is read
    said = read_model_json(path)
    if not isinstance(said, dict) or "export_format" not in said:  # what is wrong with an export is for `load` to say
        try:
            from tokenfusion.serve.run import open_run
        except ModuleNotFoundError as error:
            reason = f"is a run, which needs {error.name}, and that is not installed"
            raise InputError(f"{path} {reason}; serve a folder that `export` wrote, or install it") from error
        model, about, explain = open_run(path, settings.max_pixels, settings.threads)
        return Served(model, about, settings, explain)
    if said.get("format") == "pt2":
        reason = "is of format pt2, which needs torch in every worker and is not served"
        raise InputError(f"{path} {reason}; serve its run, or export that as onnx or openvino")
    exported = load(path, threads=settings.threads)
    if settings.max_pixels:
        limited = exported.description | {"max_pixels": settings.max_pixels}
        exported = replace(exported, description=limited)
    return Served(exported, about_exported(exported), settings)


def about_exported(exported: ExportedClassifier) -> dict[str, Any]:
    """What is said of an exported classifier.

    Raises:
        InputError: its model.json lacks some of it.
    """
    said = exported.description
    kept = ("name", "format", "precision", "classes", "multi_label", "thresholds", "preprocess", "max_pixels")
    needed = (*kept, "parity", "temperature", "tokenfusion")
    if lacking := [key for key in needed if key not in said]:
        raise InputError(f"model.json lacks {', '.join(lacking)}; it is damaged, export again")
    return {key: said[key] for key in kept} | {
        "parity": said["parity"],
        "calibration": calibration(said),
        "mistaken": said.get("mistaken", {}),
        "explains": False,
        "why_not_explained": "an exported folder holds no gradients to see by",
        "sha256": said["graph_sha256"],
        "trained_by": {"tokenfusion": said["tokenfusion"]},
        "note": exported.note,
    }
