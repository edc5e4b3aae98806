"""A run as it is served, by torch: the same answers as `predict`, and pictures of where it looked."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokenfusion.analyze.explain import Question, draw_batch
from tokenfusion.analyze.inputs import refuse_multi_label
from tokenfusion.analyze.saliency import require_readable
from tokenfusion.checkpoint import load_description
from tokenfusion.classifier import Classifier
from tokenfusion.evaluate import mistaken_of
from tokenfusion.report.pictures import png_of
from tokenfusion.serve.about import calibration
from tokenfusion_runtime.description import hash_of
from tokenfusion_runtime.errors import InputError
from tokenfusion_runtime.image import Pixels
from tokenfusion_runtime.prediction import Answers, Floats


class RunModel:
    """A run's classifier, by numpy arrays in and out; one thread predicts and explains."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.packed = classifier.packed()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.classifier.classes

    def prepare(self, image: bytes) -> tuple[str, Pixels | str]:
        """An image's prepared pixels, or why there are none."""
        path, pixels = self.classifier.prepare(image)
        return path, pixels if isinstance(pixels, str) else pixels.numpy()

    def probabilities(self, images: Pixels) -> Floats:
        """Calibrated probabilities (B, K) of prepared images, uint8 (B, in_chans, h, w)."""
        return self.packed.scores(self.packed.logits(torch.from_numpy(images))).numpy()

    def answers(self, topk: int, abstain: float | None) -> Answers:
        return self.classifier.answers(topk, abstain)

    def explain(self, pixels: Pixels, branch: str) -> tuple[list[str], bytes]:
        """Where it looked in an image (in_chans, h, w): the branches from left to right, and their overlays in one PNG.

        Raises:
            InputError: the model has no such branch, or its map is not finite.
        """
        image = torch.from_numpy(pixels)
        ((_, _, overlays),) = draw_batch(self.classifier, [(image, "")], Question(branch=branch))  # type: ignore[arg-type]
        return [branch for branch, *_ in overlays], png_of(torch.cat([picture for *_, picture in overlays], 2))


def open_run(path: Path, max_pixels: int, threads: int) -> tuple[RunModel, dict[str, Any], Callable[..., Any] | None]:
    """A finished run, what is said of it, and what explains it, if anything does.

    Raises:
        InputError: it is no finished run.
    """
    torch.set_num_threads(threads)
    classifier, said = Classifier.load(path), load_description(path)
    model = RunModel(replace(classifier, max_pixels=max_pixels or classifier.max_pixels))
    reason = ""
    try:
        refuse_multi_label(classifier.multi_label, str(path))
        require_readable(classifier.model, classifier.preprocess.img_size, "gradcam")
    except InputError as error:
        reason = str(error)
    about = {key: said[key] for key in ("name", "classes", "multi_label", "thresholds", "preprocess")} | {
        "format": "run",
        "precision": classifier.precision,
        "max_pixels": model.classifier.max_pixels,
        "parity": None,
        "calibration": calibration(said),
        "mistaken": mistaken_of(path, said["classes"]),
        "explains": not reason,
        "why_not_explained": reason,
        "sha256": hash_of([path / "model.safetensors", path / "model.json"]),  # as `predict --out` names the model
        "trained_by": said["versions"],
        "note": "",
    }
    return model, about, None if reason else model.explain
