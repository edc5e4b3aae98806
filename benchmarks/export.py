"""How fast classifiers are as shipped, beside our eager model and the peer's, eager and exported the same way.

    python benchmarks/export.py --out benchmarks/results/export.json [--models cmt_s] [--minutes 15]

All ways of a model take turns in one run; what is compared are ratios within it. Models that the JSON has are kept, so
that a run which `--minutes` ended goes on where it was; `--again` measures anew. Each starts at uint8 pixels and ends
at probabilities. The peers: the papers' public code, transcribed in `yardsticks.py`, timm's own CrossViT, a DeiT of
timm's for the Token Fusion presets (whose cost stands beside), and a pair's two parents, one after the other. Weights
are random, which changes no speed; int8 is calibrated on a few made-up images, so that its accuracy is the business of
the gate (`tokenfusion export`), not of this program. `peak` is the fastest product of two square matrices in this run.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import peak_flops, result_so_far, time_in_turns
from tokenfusion import Classifier
from tokenfusion.errors import InputError
from tokenfusion.export import artefact
from tokenfusion.export.onnx import quantized_onnx, to_onnx
from tokenfusion.export.openvino import save_openvino
from tokenfusion.files import write_json, write_text
from tokenfusion.models.base import on_meta
from tokenfusion.models.cost import CountProducts
from tokenfusion.recipe import Recipe, dump_recipe
from tokenfusion_runtime.classifier import ExportedClassifier
from yardsticks import yardstick_of

PAIR = "fuse(tf_efficientnet_lite0,vit_small_patch14_dinov2,late)"
SIZE = (224, 224)
PEERS: dict[str, str] = {
    "crossvit_9_dagger_224": "crossvit_9_dagger_240",
    "deepvit_16": "public code",
    "cmt_s": "public code",
    "tokenfusion_layerwise_tiny": "deit_tiny_patch16_224",
    "tokenfusion_layerwise_small": "deit_small_patch16_224",
    PAIR: "both parents",
}
SHIPPED = (("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"), ("onnx", "fp32"), ("onnx", "int8"))
BATCHES = (1, 8)
CLASSES = tuple(str(number) for number in range(1000))


class Parents(nn.Module):
    """Two models, one after the other; the mean of their logits."""

    def __init__(self, cnn: str, vit: str) -> None:
        super().__init__()
        self.cnn = timm.create_model(cnn, num_classes=len(CLASSES))
        self.vit = timm.create_model(vit, num_classes=len(CLASSES), img_size=SIZE)

    def forward(self, images: Tensor) -> Tensor:
        return (self.cnn(images) + self.vit(images)) / 2


def peer_of(name: str, model: nn.Module) -> nn.Module:
    """What a model is compared with, by PEERS."""
    if PEERS[name] == "public code":
        return yardstick_of(model)
    if PEERS[name] == "both parents":
        return Parents(*name.removeprefix("fuse(").split(",")[:2])
    return timm.create_model(PEERS[name], num_classes=len(CLASSES))


def save_run(classifier: Classifier, folder: Path, images: int = 8) -> Path:
    """A run folder of a classifier, with a few made-up training images to calibrate int8 on."""
    random = np.random.default_rng(0)
    for number in range(2 * images):
        path = folder / "data" / ("train", "val")[number % 2] / CLASSES[number % 4 // 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(path)
    classifier.save(folder)
    recipe = Recipe(data=str(folder / "data"), model=classifier.name, img_size=classifier.preprocess.img_size)
    write_text(folder / "recipe.toml", dump_recipe(recipe))
    return folder


def shipped(classifier: Classifier, run: Path, folder: Path) -> dict[str, ExportedClassifier]:
    """A classifier as each format and precision, from one trace; loaded as a user's machine loads it."""
    graph, found = to_onnx(classifier, None).SerializeToString(), {}
    for format, precision in SHIPPED:
        place = folder / f"{format} {precision}"
        place.mkdir(parents=True)
        description = artefact.describe(run, format, precision, None)
        copy = onnx.load_from_string(graph)
        files = ["model.onnx"] if format == "onnx" else ["model.xml", "model.bin"]
        if format == "openvino":
            save_openvino(copy, classifier, run, place / files[0], description)
        else:
            whole = quantized_onnx(copy, classifier, run, None) if precision == "int8" else copy
            onnx.save(whole, place / files[0])
        artefact.write_description(place, description | {"files": files})
        found[f"{format} {precision}"] = artefact.load(place)
    return found


def in_torch(classifier: Classifier, precision: Any, packs: bool) -> Callable[[Tensor], Tensor]:
    """A classifier's probabilities by PyTorch in a precision; packed as `predict` does it, or as it comes."""
    way = replace(classifier, precision=precision)
    way = way.packed() if packs else way
    return lambda images: way.scores(way.logits(images))


def measure(name: str, folder: Path, repetitions: int, peaks: dict[str, float]) -> dict[str, Any]:
    """A model's rows: images per second of each way, at each batch."""
    ours = Classifier.create(name, CLASSES, img_size=SIZE, precision="fp32", device=torch.device("cpu"))
    ours.model.eval()
    cfg = timm.get_pretrained_cfg(PEERS[name])
    preprocess = replace(ours.preprocess, img_size=cfg.input_size[1:] if cfg else SIZE)
    theirs = replace(ours, model=peer_of(name, ours.model).eval(), preprocess=preprocess)
    run = save_run(ours, folder / "run")
    ways, refusals = {"ours": shipped(ours, run, folder / "ours")}, []
    try:
        ways["peer"] = shipped(theirs, run, folder / "peer")
    except InputError as error:  # code that fixes the number of images while it is traced
        ways["peer"], refusals = {}, [f"the peer: {error}"]
    cost = {who: macs_of(one) for who, one in (("ours", ours), ("peer", theirs))}
    result: dict[str, Any] = {"model": name, "peer": PEERS[name], "gmacs": {k: v / 1e9 for k, v in cost.items()}}
    result["peak_gflops"] = {precision: flops / 1e9 for precision, flops in peaks.items()}
    result["notes"] = refusals + sorted({one.note for found in ways.values() for one in found.values() if one.note})
    for batch in BATCHES:
        calls: dict[str, Callable[[], Any]] = {}
        for who, one in (("ours", ours), ("peer", theirs)):
            pixels = torch.randint(0, 256, (batch, 3, *one.preprocess.img_size), dtype=torch.uint8)
            for precision in ("fp32", "bf16"):
                calls[f"{who} eager {precision}"] = partial(in_torch(one, precision, who == "ours"), pixels)
            for way, loaded in ways[who].items():
                calls[f"{who} {way}"] = partial(loaded.probabilities, pixels.numpy())
        times = time_in_turns(calls, repetitions)
        rates = {way: 1000 * batch / ms for way, ms in times.items()}
        shares = {
            way: 2 * cost[way.split()[0]] * rate / peaks[way.split()[-1]]
            for way, rate in rates.items()
            if way.split()[-1] in peaks
        }
        against = {way: rate / rates["peer eager fp32"] for way, rate in rates.items()}
        result[f"batch {batch}"] = {"images_per_s": rates, "times_the_peer": against, "share_of_peak": shares}
    return result


def macs_of(classifier: Classifier) -> float:
    """Multiply-adds of an image."""
    twin = on_meta(classifier.model)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), CountProducts() as products:
        twin(torch.empty(1, 3, *classifier.preprocess.img_size, device="meta"))
    return sum(products.macs.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, or to go on with")
    parser.add_argument("--models", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=15.0, help="no further model is begun after so many")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    options = parser.parse_args()
    begun, result = time.monotonic(), result_so_far(options.out, options.again) | {"models": list(PEERS)}
    peaks, done = peak_flops(options.repetitions), {row["model"] for row in result["results"]}
    for name in [name for name in options.models if name not in done]:
        if time.monotonic() - begun > 60 * options.minutes:
            print(f"{name} is left out: {options.minutes:g} minutes are over")
            continue
        with tempfile.TemporaryDirectory() as folder:
            result["results"].append(measure(name, Path(folder), options.repetitions, peaks))
        print(result["results"][-1], flush=True)
        write_json(options.out, result)


if __name__ == "__main__":
    main()
