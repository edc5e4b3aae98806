"""What a trained run looks at, drawn over its images: `tokenfusion explain`."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tokenfusion.analyze.faithfulness import LOOKS, Probability, importance, measure_faithfulness
from tokenfusion.analyze.inputs import open_run_or_model, refuse_inside_images, refuse_multi_label
from tokenfusion.analyze.record import evaluating
from tokenfusion.analyze.saliency import require_readable, saliency
from tokenfusion.classifier import Classifier, batched
from tokenfusion.data.dataset import printable
from tokenfusion.data.loader import eval_batches
from tokenfusion.errors import InputError
from tokenfusion.files import own_folder, write_bytes, write_json
from tokenfusion.formatting import Progress, unheard
from tokenfusion.hardware import autocast
from tokenfusion.models.base import choose
from tokenfusion.report.pictures import decode_named, png_of
from tokenfusion.report.run import worst_mistakes
from tokenfusion.report.run_folder import PredictionRow, read_evaluation
from tokenfusion_runtime.files import expand

Method = Literal["gradcam", "rollout", "attention"]
Branch = Literal["cnn", "transformer", "both"]
BATCH = 16
SIDE = 224
"""Pixels that the longer side of an overlay has at least."""
ToExplain = tuple[str, Tensor | str, str]
"""An image's path; its pixels (in_chans, h, w) or why there are none; the class it was taken for, or ""."""
Drawn = tuple[str, float, list[tuple[str, str, float, Tensor]]]
"""Prediction and its probability; branch, class, the class's probability and overlay (3, H, W) of each picture."""


@dataclass(frozen=True)
class Question:
    """What is to be explained.

    Attributes:
        method, branch: as in `saliency`.
        of_class: a class's name; the predicted ones where it is "".
        topk: how many of those.
    """

    method: Method = "gradcam"
    branch: Branch = "both"
    of_class: str = ""
    topk: int = 1

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise InputError(f"topk={self.topk} explains no class; give 1 or more")
        if self.method != "gradcam" and (self.of_class or self.topk > 1):
            raise InputError(
                f"--method {self.method} is the same for every class; leave out --class and --topk, "
                "or take --method gradcam"
            )
        if self.of_class and self.topk > 1:
            raise InputError(f"--class {self.of_class} is one class; leave out --topk {self.topk}")


def explain(
    run: Path,
    images: Sequence[str] = (),
    question: Question = Question(),
    *,
    out: Path | None = None,
    faithfulness: int = 0,
    progress: Progress = unheard,
) -> tuple[dict[str, Any], Path]:
    """Draw what a run looks at over images; write the overlays and `explain.json`.

    Args:
        run: a finished run folder.
        images: files, folders, globs; the worst mistakes of the run's evaluation when none is given, or where it made
            none the right answers that it was least sure of.
        question: what to explain; of mistakes the predicted class is the one that the evaluation named.
        out: folder to write to; RUN/explain when not given, and RUN/explain/mistakes of the worst mistakes, where the
            report finds them.
        faithfulness: how many held-out images to measure `measure_faithfulness` on; 0 for none.
        progress: told of the images that are explained, and of the measuring of faithfulness, in looks at an image.

    Returns:
        what `explain.json` holds: `model`, `method`, `chosen` ("named", the "mistakes", or where there are none the
        right answers that are "least sure"), `images`, each with `path`, `prediction`, `score` and `overlays`
        (`branch`, `class`, `score`, `file`), or with `path` and `error`; `faithfulness`, or None; and the folder.

    Raises:
        InputError: the run cannot be used, it is not evaluated, the method says nothing of the model or the branch, or
            none of the named images can be read.
    """
    if faithfulness < 0:
        raise InputError(f"faithfulness={faithfulness} is no number of images; give 1 or more, or 0 to measure none")
    classifier = Classifier.load(run)
    refuse_multi_label(classifier.multi_label, str(run))
    if question.of_class:
        choose(dict.fromkeys(classifier.classes), question.of_class, "class")
    require_readable(classifier.model, classifier.preprocess.img_size, question.method)
    named = list(expand(images))
    wrong, shown = (True, []) if named else judged_of(run, classifier)
    prepared = ((*one, "") for one in classifier.prepare_ahead(named)) if named else evaluated(run, classifier, shown)
    chosen = "named" if named else "mistakes" if wrong else "least sure"
    folder = out or run / "explain" / {"named": ""}.get(chosen, chosen.replace(" ", "-"))
    refuse_inside_images(folder, run)
    with own_folder(folder):
        entries: list[dict[str, Any]] = []
        for entry in explain_images(classifier, prepared, question, folder):
            entries.append(entry)
            progress("explaining", len(entries), len(named or shown))
        if named and all("error" in entry for entry in entries):
            first, more = entries[0], f", and {len(entries) - 1} more" * (len(entries) > 1)
            remedy = "give images that can be read, nothing was written"
            raise InputError(f"{first['path']}{more}: {first['error']}; {remedy}")
        measured = measure_run(run, faithfulness, question, progress) if faithfulness else None
        about: dict[str, Any] = {"model": classifier.name, "method": question.method, "chosen": chosen}
        result = about | {"images": entries, "faithfulness": measured}
        write_json(folder / "explain.json", result)
    return result, folder


LEAST_SURE = 8
"""Right answers that are explained where there is no mistake."""


def judged_of(run: Path, classifier: Classifier) -> tuple[bool, list[PredictionRow]]:
    """Whether a run's evaluation found mistakes, and the worst of them, or else the right answers that are least sure.

    Raises:
        InputError: it has not been evaluated, or an image was taken for a class that there is not.
    """
    evaluation, predictions = read_evaluation(run, list(classifier.classes))
    if evaluation is None:
        raise InputError(f"{run} has not been evaluated; name images, or run `tokenfusion evaluate {run}` first")
    worst = worst_mistakes(predictions)
    shown = worst or sorted(predictions, key=lambda row: (row.score, row.path))[:LEAST_SURE]
    for row in shown:
        choose(dict.fromkeys(classifier.classes), row.prediction, "prediction")
    return bool(worst), shown


def evaluated(run: Path, classifier: Classifier, rows: Sequence[PredictionRow]) -> Iterator[ToExplain]:
    """Images of a run's evaluation, read from the data that it was evaluated on.

    Raises:
        InputError: the data is gone.
    """
    found = decode_named(run, (row.path for row in rows))
    for (path, image), row in zip(found, rows, strict=True):
        if isinstance(image, Tensor):
            yield path, classifier.preprocess.resize(image), row.prediction
        else:
            yield path, f"it cannot be read any more: {image}", row.prediction


def explain_images(
    classifier: Classifier, images: Iterable[ToExplain], question: Question, folder: Path
) -> Iterator[dict[str, Any]]:
    """An entry for each image, in order; its overlays are written as PNG into the folder."""
    number = count()
    for batch in batched(images, BATCH):
        readable = [(image, prediction) for _, image, prediction in batch if isinstance(image, Tensor)]
        drawn = iter(draw_batch(classifier, readable, question) if readable else ())
        for path, image, _ in batch:
            prefix = f"{next(number):04d}-{safe(Path(path).stem)}"
            if isinstance(image, str):
                yield {"path": printable(path), "error": image}
                continue
            prediction, score, overlays = next(drawn)
            entry: dict[str, Any] = {"path": printable(path), "prediction": prediction, "score": score, "overlays": []}
            for rank, (branch, name, probability, picture) in enumerate(overlays):
                file = f"{prefix}-{rank}-{branch}-{safe(name)}.png"
                write_bytes(folder / file, png_of(picture))
                entry["overlays"].append({"branch": branch, "class": name, "score": probability, "file": file})
            yield entry


def draw_batch(classifier: Classifier, batch: Sequence[tuple[Tensor, str]], question: Question) -> Iterator[Drawn]:
    """What there is to draw of images (in_chans, h, w), each with the class that an evaluation took it for, or ""."""
    pictures = torch.stack([image for image, _ in batch])  # (B, in_chans, h, w)
    images, classes = classifier.to_input(pictures), classifier.classes
    probabilities = probabilities_of(classifier, images).cpu()
    order = probabilities.clone()
    for row, (_, prediction) in zip(order, batch, strict=True):
        if prediction:
            row[classes.index(prediction)] = 2  # what the evaluation said comes first, were it level with another
    best = order.topk(min(question.topk, len(classes)), dim=1).indices
    explained = torch.full_like(best[:, :1], classes.index(question.of_class)) if question.of_class else best
    columns = [
        saliency(classifier.model, images, column, question.method, question.branch) for column in explained.unbind(1)
    ]
    for i, (picture, scores) in enumerate(zip(pictures.cpu(), probabilities, strict=True)):
        overlays = [
            (branch, classes[chosen[i]], float(scores[chosen[i]]), overlay(picture, found[i]))
            for maps, chosen in zip(columns, explained.unbind(1), strict=True)
            for branch, found in maps.items()
        ]
        yield classes[best[i, 0]], float(scores[best[i, 0]]), overlays


def overlay(picture: Tensor, saliency_map: Tensor) -> Tensor:
    """A map (h, w) in colour over an image, uint8 (1 or 3, H, W): uint8 (3, H', W'), enlarged where it is small."""
    import matplotlib

    scale = ceil(SIDE / max(picture.shape[1:]))
    large = picture.expand(3, -1, -1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    top = saliency_map.max()
    low = torch.minimum(saliency_map.min(), 0.95 * top)  # rounding errors stay unseen
    level = (saliency_map - low) / (top - low).clamp_min(torch.finfo(saliency_map.dtype).tiny)
    smooth = importance(level[None], (large.shape[1], large.shape[2]))[0].clamp(0, 1)
    heat = torch.from_numpy(matplotlib.colormaps["turbo"](smooth.numpy())[..., :3]).permute(2, 0, 1)
    return (large / 2 + 255 * heat / 2).round().to(torch.uint8)


def safe(name: str) -> str:
    """A name as a part of a file's name that stays in its folder on any system."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:40].strip("_") or "x"


def measure_run(run: Path, num_images: int, question: Question, progress: Progress = unheard) -> dict[str, Any]:
    """`measure_faithfulness` of the predicted class of held-out images."""
    classifier, images = open_run_or_model(str(run), None, num_images, partial(progress, "reading images"))
    done = 0

    def look(classes: Tensor, looks: int, pixels: Tensor) -> Tensor:
        nonlocal done
        done += len(pixels)
        progress("measuring faithfulness", done, looks)
        return probability_of(classifier, classes, pixels)

    def batches() -> Iterator[tuple[Tensor, dict[str, Tensor], Probability]]:
        for batch, _ in eval_batches(images, classifier.preprocess, batch_size=BATCH):
            pixels = classifier.to_input(batch)
            classes = probabilities_of(classifier, pixels).argmax(1)
            maps = saliency(classifier.model, pixels, classes, question.method, question.branch)
            yield pixels, maps, partial(look, classes, len(images) * len(maps) * LOOKS)

    return {"images": len(images)} | measure_faithfulness(batches())


@torch.no_grad()
def probabilities_of(classifier: Classifier, images: Tensor) -> Tensor:
    """Probabilities (B, K) of input images, in the arithmetic that the classifier predicts in."""
    with evaluating(classifier.model), autocast(classifier.device, classifier.precision):
        return (classifier.model(images).float() / classifier.temperature).softmax(1)


def probability_of(classifier: Classifier, classes: Tensor, images: Tensor) -> Tensor:
    """Each input image's probability (B,) of its class (B,)."""
    return probabilities_of(classifier, images).gather(1, classes[:, None])[:, 0]


def faithfulness_summary(measured: dict[str, Any]) -> list[str]:
    """A line a branch on what `measure_faithfulness` found."""
    lines = []
    for branch, ways in measured.items():
        if branch == "images":
            continue
        parts = []
        for way, better in (("deletion", "lower"), ("insertion", "higher")):
            areas = ", ".join(f"{kind} {ways[way][kind]['mean']:.3f}" for kind in ("map", "random", "centre"))
            parts.append(f"{way} ({better} is better) {areas}")
        lines.append(f"{branch.replace('_', ' ')}, {measured['images']} images: {'; '.join(parts)}")
    return lines
