"""How memory, multiply-adds and time grow: with the image's size, the batch, and the number of images.

    python benchmarks/growth.py --out benchmarks/results/growth.json             # counts and memory, on any machine
    python benchmarks/growth.py --times --out benchmarks/results/growth.json     # times too, on a quiet one
    python benchmarks/growth.py --quick --out /tmp/growth.json                   # up to QUICK, in a minute or two

Three tables:

- `sizes`: one layer of WIDTH channels and HEADS heads on one image of patches of 16 px and CLS: self-attention,
  cross-attention of CLS alone (CrossViT), Re-attention (DeepViT). Inference, and forward and backward.
- `batches`: whole models, inference and training step.
- `images`: what is done to all images of a data set without a look at their pixels: the index of a folder and its
  split; what is kept of frozen parents, searched for neighbours, and fitted by a linear classifier; copies in the
  check-up. Folders are of hard links to a few images; everything else is drawn at random.

Each row is measured in a process of its own, after a small call of the same kind: its memory is by how much the process
grew at most. Rows that the file has are kept, so that a run which was stopped goes on.
"""

import argparse
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common import environment
from tokenfusion.check.duplicates import MAX_IMAGES, exact_duplicates, near_duplicates
from tokenfusion.check.inspection import SIDE, Inspection
from tokenfusion.classifier import Classifier
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import Images
from tokenfusion.data.open import open_dataset
from tokenfusion.data.split import choose_split
from tokenfusion.features import FeatureRows, Features
from tokenfusion.files import write_json
from tokenfusion.hardware import resident_mb
from tokenfusion.layers.attend import SelfAttention
from tokenfusion.layers.cross_attention import ClsCrossAttention
from tokenfusion.models import create_model
from tokenfusion.models.cost import CountProducts
from tokenfusion.models.deepvit import BatchNormMixing, ReAttention
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.preset import PRETRAINED_PAIR
from tokenfusion.probe import CS, fit_linear
from tokenfusion.processes import in_fresh_process
from tokenfusion.similar import means_of_rows, nearest

WIDTH, HEADS, PATCH = 384, 12, 16
PIXELS = (112, 160, 224, 320, 448, 640, 896)
BATCHES = (1, 4, 16)
MODELS = ("deepvit_16", "crossvit_9_dagger_224", "tokenfusion_layerwise_small")
IMAGES = (1_000, 10_000, 100_000, 1_000_000)
QUICK = {"pixels": 448, "batch": 4, "images": 100_000}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "self-attention": lambda: SelfAttention(WIDTH, HEADS),
    "cross-attention of CLS": lambda: ClsCrossAttention(WIDTH, HEADS),
    "Re-attention": lambda: ReAttention(WIDTH, HEADS, BatchNormMixing(HEADS)),
}
CLASSES, FEATURES, QUERIES = 10, 1024, 64
LIMITS = {"neighbours": 100_000, "near duplicates": 10_000, "linear classifier": 100_000}
"""Most images of what grows so that more would take hours, or more memory than there is here."""


# --- one row, in a process of its own


def measured(call: Callable[[], Any], warm_up: Callable[[], Any], times: bool) -> dict[str, float | None]:
    """MiB by which this process grows at most during a call, and the seconds of the fastest of three."""
    warm_up()
    with suppress(OSError):  # where this is not allowed, the imports' peak counts if it was higher
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_mb("VmRSS")
    call()
    after = resident_mb("VmHWM")
    grown = None if before is None or after is None else after - before
    return {"memory_mb": grown, "seconds": min(seconds(call) for _ in range(3)) if times else None}


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pass_through(module: nn.Module, what: str, inputs: Tensor) -> None:
    """Inference, or a forward and a backward pass."""
    module.train(what == "training")
    with torch.set_grad_enabled(what == "training"):
        output = module(inputs)
    if what == "training":
        output.square().mean().backward()


def measure_layer(name: str, tokens: int, what: str, times: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    layer, inputs = LAYERS[name](), torch.randn(1, tokens, WIDTH)
    small = inputs[:, :17]
    with torch.device("meta"), CountProducts() as count, torch.no_grad():
        explicit(LAYERS[name]()).train(False)(torch.empty(1, tokens, WIDTH))
    found = measured(lambda: pass_through(layer, what, inputs), lambda: pass_through(layer, what, small), times)
    return {"macs": count.macs.total(), **found}


def explicit(layer: nn.Module) -> nn.Module:
    """By maps, whose products can be counted."""
    for module in layer.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return layer


def measure_model(name: str, batch: int, what: str, times: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = create_model(name)
    images = torch.randn(batch, 3, *model.img_size)
    return measured(lambda: pass_through(model, what, images), lambda: None, times)


def measure_images(what: str, count: int, scratch: Path, times: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    return WORK[what](count, scratch, times)


# --- what is done to all images


def index(count: int, scratch: Path, times: bool) -> dict[str, Any]:
    """A folder of so many files, and which are held out."""
    folder = scratch / str(count)
    make_folder(folder, count)

    def call() -> None:
        dataset = open_dataset(str(folder))
        choose_split(dataset, 0.1, 0)

    few = scratch / f"few beside {count}"
    make_folder(few, 100)
    return measured(call, lambda: open_dataset(str(few)), times)


def make_folder(folder: Path, count: int) -> None:
    """Class folders of links to one image a thousand: a file system allows a file only so many."""
    image = io.BytesIO()
    Image.new("RGB", (1, 1)).save(image, "PNG")
    for number in range(count):
        if number % 1000 == 0:
            source = folder / f"class-{number // 1000 % CLASSES}" / f"photo-{number:07}.png"
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_bytes(image.getvalue())
        else:
            link = folder / f"class-{number % CLASSES}" / f"photo-{number:07}.png"
            link.parent.mkdir(exist_ok=True)
            os.link(source, link)


def neighbours(count: int, scratch: Path, times: bool) -> dict[str, Any]:
    """The nearest images of QUERIES others, by what small parents saw."""
    classifier = Classifier.create("fuse(resnet_micro,vit_micro,probe)", [str(k) for k in range(CLASSES)])
    length, path = cast(ProbeFusion, classifier.model).row_length, scratch / "rows.f16"
    rows = np.memmap(path, np.float16, "w+", shape=(count, length))
    block = np.random.default_rng(0).standard_normal((min(count, 1000), length)).astype(np.float16)
    for start in range(0, count, len(block)):
        rows[start : start + len(block)] = block
    del rows

    def search(images: int) -> None:
        kept = FeatureRows(path, np.memmap(path, np.float16, "r", shape=(count, length))[:images])
        features = Features(images_of(images), kept, np.arange(images)[None])
        queries = means_of_rows(classifier, torch.from_numpy(block[:QUERIES]).float())
        nearest(classifier, queries, features, 5)

    found = measured(lambda: search(count), lambda: search(100), times)
    path.unlink()
    return {**found, "bytes_an_image": 2 * length}


def images_of(count: int) -> Images:
    """Names and labels of images that are nowhere."""
    names = [f"photo-{number:07}.jpg" for number in range(count)]
    labels = np.arange(count) % CLASSES
    reader: Any = None
    classes = tuple(map(str, range(CLASSES)))
    return Images(Dataset(where="", names=names, labels=labels, classes=classes, splits=[""] * count, reader=reader), 1)


def linear_classifier(count: int, scratch: Path, times: bool) -> dict[str, Any]:  # noqa: ARG001 - as the others
    """A linear classifier of FEATURES means, fitted with a fifth set aside."""
    random = np.random.default_rng(0)
    features, labels = random.standard_normal((count, FEATURES), dtype=np.float32), np.arange(count) % CLASSES
    features[:, :CLASSES] += np.eye(CLASSES, dtype=np.float32)[labels]
    kept, held = np.arange(count // 5, count), np.arange(count // 5)

    found = measured(lambda: fit_linear(features, labels, [(kept, held)]), lambda: None, times)
    if found["memory_mb"] is not None:
        found["memory_mb"] += features.nbytes / 2**20
    return found


def exact(count: int, scratch: Path, times: bool) -> dict[str, Any]:  # noqa: ARG001 - as the others
    """Groups of images of the same pixels, by their digests, one in a hundred a copy."""

    def call() -> None:
        digests = (number - (number % 100 == 1) for number in range(count))
        exact_duplicates([Inspection("", 480, 640, digest=digest.to_bytes(16, "big")) for digest in digests])

    return measured(call, lambda: None, times)


def near(count: int, scratch: Path, times: bool) -> dict[str, Any]:  # noqa: ARG001 - as the others
    """Copies that were encoded anew or cropped: every pair of descriptors is compared."""

    def call(images: int) -> None:
        thumbnails = torch.randint(0, 256, (images, 3, SIDE, SIDE), dtype=torch.uint8)
        near_duplicates(
            [
                Inspection("", 480, 640, digest=number.to_bytes(8, "big"), thumbnail=thumbnail)
                for number, thumbnail in enumerate(thumbnails)
            ],
            lambda *_: None,
        )

    return measured(lambda: call(count), lambda: call(100), times)


WORK: dict[str, Callable[[int, Path, bool], dict[str, Any]]] = {
    "index of a folder": index,
    "neighbours": neighbours,
    "linear classifier": linear_classifier,
    "exact duplicates": exact,
    "near duplicates": near,
}


# --- all rows


class Rows:
    """The rows of a result, written as they come; those that it has with all that is wanted are not measured again."""

    def __init__(self, path: Path, times: bool) -> None:
        self.path, self.times = path, times
        self.result = json.loads(path.read_text()) if path.exists() else {}
        self.result |= environment() | walls()

    def add(self, table: str, key: dict[str, Any], function: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        rows = self.result.setdefault(table, [])
        for row in rows:
            if key.items() <= row.items():
                if row["seconds"] is not None or not self.times:
                    return
                rows.remove(row)
                break
        rows.append(key | in_fresh_process(function, *arguments, self.times))
        print(table, rows[-1], flush=True)
        write_json(self.path, self.result)


def walls() -> dict[str, Any]:
    """Limits that the package itself sets, and what one image takes."""
    with torch.device("meta"):
        model = cast(ProbeFusion, create_model(PRETRAINED_PAIR, img_size=224))
    kept = 2 * model.row_length
    return {
        "kept_by": PRETRAINED_PAIR,
        "kept_bytes_an_image": kept,
        "cache_gb": 50,
        "kept_images_at_most": 50 * 2**30 // kept,
        "near_duplicates_at_most": MAX_IMAGES,
        "penalties_tried": len(CS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, or to go on with")
    parser.add_argument("--times", action="store_true", help="measure seconds too; leave the machine alone meanwhile")
    parser.add_argument("--quick", action="store_true", help="smaller images, batches and data sets only")
    options = parser.parse_args()
    most = QUICK if options.quick else {"pixels": PIXELS[-1], "batch": BATCHES[-1], "images": IMAGES[-1]}
    multiprocessing.set_forkserver_preload(["tokenfusion.similar", "tokenfusion.check.duplicates", "timm", "sklearn"])
    rows = Rows(options.out, options.times)
    for pixels in (size for size in PIXELS if size <= most["pixels"]):
        tokens = (pixels // PATCH) ** 2 + 1
        for layer in LAYERS:
            for what in ("inference", "training"):
                key = {"layer": layer, "what": what, "pixels": pixels, "tokens": tokens}
                rows.add("sizes", key, measure_layer, layer, tokens, what)
    for batch in (size for size in BATCHES if size <= most["batch"]):
        for model in MODELS:
            for what in ("inference", "training"):
                key = {"model": model, "what": what, "batch": batch}
                rows.add("batches", key, measure_model, model, batch, what)
    with tempfile.TemporaryDirectory() as scratch:
        for count in (size for size in IMAGES if size <= most["images"]):
            for what in WORK:
                if count <= LIMITS.get(what, count):
                    key = {"what": what, "images": count}
                    rows.add("images", key, measure_images, what, count, Path(scratch))


if __name__ == "__main__":
    main()
