"""Images per second of `tokenfusion predict --out` against the model alone, at 224 px.

    python benchmarks/predict.py ../shared/data/imagenette-224.tar --out benchmarks/results/predict.json

`alone`: the model on batches that are decoded, resized and stacked beforehand. `predict`: the same images from their
files into Parquet, decoded, resized and written as a user has it; what happens before the first batch comes out
(loading the model, finding the images) is left out. Both models are packed, as `predict` packs its own, and take
turns. The weights are random, which changes no time.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common import environment
from tokenfusion import Classifier
from tokenfusion.classifier import batched
from tokenfusion.data.decode import Hearing
from tokenfusion.data.unlabelled import find_parts
from tokenfusion.files import write_json
from tokenfusion.hardware import keep_freed_memory
from tokenfusion.predict.many import predict_many, prepare

MODELS = ("tokenfusion_layerwise_tiny", "tokenfusion_early_small", "resnet50")


def prepared(classifier: Classifier, data: str, batch_size: int, most: int) -> list[Tensor]:
    """Batches of images as the model is given them, as many as fit into memory."""
    hearing = Hearing()
    found = (prepare(classifier, hearing, image) for part in find_parts([data], most) for image in part.images())
    readable = islice((pixels for (_, pixels), _ in found if isinstance(pixels, Tensor)), most)
    return [torch.stack(batch) for batch in batched(readable, batch_size)]


def about(data: str) -> dict[str, Any]:
    """How many images there are, and the median of their sizes, width×height, and of their files' bytes."""
    files = [image.read() for part in find_parts([data], 1000) for image in part.images()]
    encoded = [file for file in files if isinstance(file, bytes)]
    sizes = [Image.open(BytesIO(file)).size for file in encoded]
    width, height = (round(statistics.median(side)) for side in zip(*sizes, strict=True))
    return {"count": len(encoded), "size": f"{width}×{height}", "bytes": statistics.median(map(len, encoded))}


def alone(classifier: Classifier, batches: list[Tensor]) -> float:
    """Images per second of the model, packed as `predict` packs it."""
    classifier = classifier.packed()
    classifier.logits(batches[0])
    start = time.perf_counter()
    for batch in batches:
        classifier.logits(batch)
    return sum(map(len, batches)) / (time.perf_counter() - start)


def whole(run: Path, data: str, batch_size: int, workers: int | None) -> float:
    """Images per second of `predict --out`, from its first batch to its last."""
    times: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        predict_many(
            run,
            [data],
            Path(folder) / "out",
            batch_size=batch_size,
            workers=workers,
            progress=lambda _done, _parts, images: times.append((images, time.perf_counter())),
        )
    (first, start), (last, end) = times[0], times[-1]
    return (last - first) / (end - start)


def measure(models: list[str], data: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row a model; none is begun after `given.minutes`."""
    begun = time.monotonic()
    for name in models:
        if time.monotonic() - begun > 60 * given.minutes:
            print(f"{name} is left out: {given.minutes:g} minutes are over")
            continue
        classifier = Classifier.create(name, [str(number) for number in range(10)], img_size=(224, 224))
        batches = prepared(classifier, data, given.batch_size, given.in_memory)
        rates: dict[str, list[float]] = {"alone": [], "predict": []}
        with tempfile.TemporaryDirectory() as folder:
            classifier.save(Path(folder))
            for _ in range(given.repetitions):
                rates["alone"].append(alone(classifier, batches))
                rates["predict"].append(whole(Path(folder), data, given.batch_size, given.workers))
        share = statistics.median(p / a for a, p in zip(rates["alone"], rates["predict"], strict=True))
        yield {"model": name, "share": share} | {way: statistics.median(values) for way, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="images, as `predict` takes them")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, help="threads that decode; one a core when not given")
    parser.add_argument("--in-memory", type=int, default=512, help="images that the model alone is measured on")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=15.0, help="no further model is begun after so many")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "predict.json")
    given = parser.parse_args()
    settings = {"batch_size": given.batch_size, "workers": given.workers, "repetitions": given.repetitions}
    keep_freed_memory()  # as `predict --out` does
    before, rows = (
        environment() | settings | {"data": Path(given.data).name, "images": about(given.data), "packed": True},
        [],
    )
    for row in measure(given.models, given.data, given):
        rows.append(row)
        print(f"{row['model']}: {row['alone']:.1f} images/s alone, {row['predict']:.1f} by predict: {row['share']:.1%}")
        write_json(given.out, before | {"models": rows})


if __name__ == "__main__":
    main()
