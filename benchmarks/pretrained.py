"""What two pretrained parents know alone, and what fusing their tokens adds, on few and many images of CIFAR-10.

python benchmarks/pretrained.py --data cifar10 --weights DIR --out benchmarks/results/pretrained.json

DIR holds tf_efficientnet_lite0.safetensors and vit_small_patch14_dinov2.safetensors under timm's names. Every image
passes both once, at 112×112 pixels; what they see is kept in TOKENFUSION_CACHE. Each draw of training images is judged
on the whole test set. Resumable: draws that the JSON holds already are not computed again.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn

from tokenfusion import Recipe, fuse
from tokenfusion.classifier import Classifier
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import Images, read_images
from tokenfusion.data.loader import TrainLoader, as_it_is
from tokenfusion.data.open import open_dataset
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.features import Decider, Looked, Rows, keep_features, of_kept
from tokenfusion.files import write_json
from tokenfusion.hardware import hardware_name
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.preset import KEPT_TOKENS
from tokenfusion.probe import POOLED, TOKENS, fit_probe
from tokenfusion.training.distributed.world import Requests
from tokenfusion.training.linear_start import VOTERS, blocks_of, give_start, standardize
from tokenfusion.training.objective import BatchMixing, CrossEntropy
from tokenfusion.training.optimizer import make_optimizer
from tokenfusion.training.setup import Run, Setup
from tokenfusion.training.state import TrainState
from tokenfusion.training.step import train_step

CNN, VIT = "tf_efficientnet_lite0", "vit_small_patch14_dinov2"
SIZE, CHUNK = 112, 5_000


def parents(weights: Path, classes: tuple[str, ...]) -> Classifier:
    """Both parents, fused, with their weights; images are normalised for the transformer, and changed for the CNN."""
    cnn = timm.create_model(CNN)
    cnn.load_state_dict(load_file(weights / f"{CNN}.safetensors"))
    vit = timm.create_model(VIT, img_size=SIZE, num_classes=0)
    tensors = {name: tensor.float() for name, tensor in load_file(weights / f"{VIT}.safetensors").items()}
    vit.load_state_dict(checkpoint_filter_fn(tensors, vit))
    torch.manual_seed(0)
    model = fuse(cnn, vit, "probe", num_classes=len(classes), img_size=SIZE).freeze("cnn", "vit").eval()
    config = model.default_cfg
    preprocess = Preprocess((SIZE, SIZE), 3, tuple(config["mean"]), tuple(config["std"]))
    name = f"fuse({CNN},{VIT},probe)"
    placed = model.to(memory_format=torch.channels_last)
    return Classifier(name, placed, classes, preprocess, torch.device("cpu"), "fp32")


def seen(classifier: Classifier, data: str, split: str, count: int) -> tuple["Chunks", np.ndarray]:
    """Kept rows and labels of the first images of a part of the data in a fixed random order, chunk by chunk."""
    source = open_dataset(data)
    indices = np.array([i for i, part in enumerate(source.splits) if part == split])
    order = np.random.default_rng(0).permutation(indices)[:count] if split == "train" else indices[:count]
    rows, labels = [], []
    for start in range(0, len(order), CHUNK):
        images, _ = read_images(source, order[start : start + CHUNK], max_pixels=10**6, cache_bytes=2**30)
        clock = time.perf_counter()
        rows.append(keep_features(classifier, images).rows.rows)
        labels.append(images.labels.numpy())
        print(split, start + len(images), f"{time.perf_counter() - clock:.1f} s", flush=True)
    return Chunks(rows), np.concatenate(labels)


class Chunks:
    """Kept rows of several files in a row, float16 (N, F)."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
        indices = np.arange(len(self))[which]
        return np.stack([self.parts[i // CHUNK][i % CHUNK] for i in indices])


def looked(rows: np.ndarray) -> Looked:
    """Kept rows as they are read, without the images."""
    return Looked(None, Rows(Path(), rows), np.arange(len(rows)).reshape(1, -1))


def draw(
    model: ProbeFusion, rows: Chunks, labels: np.ndarray, test: tuple, count: int, seed: int, operators: list[str]
):
    """What each way knows of the test images, after so many training images, drawn by a seed."""
    model = copy.deepcopy(model)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(labels))[:count])
    some, known = rows[chosen], labels[chosen]
    clock = time.perf_counter()
    standardize(model, looked(some))
    voting = count <= VOTERS
    blocks = blocks_of(model, looked(some), voting)
    probe = fit_probe({name: blocks[name] for name in ("cnn", "vit")}, POOLED, known, print)
    judged = judge_in_parts(model, probe, test, tokens=False)
    result = judged | {"probe_seconds": time.perf_counter() - clock}
    if voting:
        clock = time.perf_counter()
        probe = fit_probe(blocks, POOLED | TOKENS, known, print)
        judged = judge_in_parts(model, probe, test, tokens=True)
        result |= {"votes": judged["mixture"], "cnn_tokens": judged["cnn_tokens"], "vit_tokens": judged["vit_tokens"]}
        result |= {"votes_seconds": time.perf_counter() - clock}
    give_start(model, probe)
    for operator in operators:
        clock = time.perf_counter()
        result[operator] = trained(model, some, known, test, seed, operator)
        result[f"{operator}_seconds"] = time.perf_counter() - clock
    return result


def judge_in_parts(model: ProbeFusion, probe, test: tuple, tokens: bool) -> dict[str, float]:
    """Accuracies on the test images, some at a time."""
    rows, labels = test
    parts = [
        probe.judge(blocks_of(model, looked(rows[i : i + 1000]), tokens), labels[i : i + 1000])
        for i in range(0, len(labels), 1000)
    ]
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def trained(start: ProbeFusion, rows: np.ndarray, labels: np.ndarray, test: tuple, seed: int, operator: str) -> float:
    """Accuracy after training what fuses on kept tokens by the steps of any run."""
    torch.manual_seed(seed)
    model = fuse(
        copy.deepcopy(start.cnn), copy.deepcopy(start.vit.model), "probe", operator, num_classes=10, img_size=SIZE
    )
    same = {
        name: value for name, value in start.state_dict().items() if name.startswith(("head", "votes", "standardize"))
    }
    same |= {name: value for name, value in start.state_dict().items() if ".standardize." in name}
    model.load_state_dict(same, strict=False)
    model.freeze("cnn", "vit").set_gates(0.0)
    recipe = Recipe(**KEPT_TOKENS | {"head_lr": 0.1, "seed": seed, "precision": "fp32"})
    names = [""] * len(labels)
    dataset = Dataset(
        where="",
        names=names,
        labels=labels,
        classes=tuple(map(str, range(10))),
        splits=names,
        reader=Rows(Path(), rows),
    )
    loader = TrainLoader(Images(dataset, 1, cached=True), as_it_is, batch_size=recipe.batch_size, seed=seed, workers=0)
    preprocess = Preprocess((SIZE, SIZE), 3, (0.5,) * 3, (0.5,) * 3)
    classifier = of_kept(Classifier("", model, dataset.classes, preprocess, torch.device("cpu"), "fp32"))
    mixing, loss = BatchMixing(recipe, 10), CrossEntropy(0.0)
    setup = Setup(recipe, Run(Path(), Console(quiet=True)), classifier, loader, mixing, loss, loader.images)
    state = TrainState(model, make_optimizer(model, recipe), 0.0, keep_best=False, network=Decider(model))
    for epoch in range(recipe.epochs):
        for batch in loader.epoch(epoch):
            train_step(setup, state, batch, Requests())
            state.progress.step += 1
    model.eval()
    with torch.inference_mode():
        test_rows = (torch.from_numpy(test[0][i : i + 500]).float() for i in range(0, len(test[1]), 500))
        predicted = torch.cat([model.decide(part).argmax(1) for part in test_rows])
    return float((predicted.numpy() == test[1]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 1000, 4000])
    parser.add_argument("--operators", nargs="*", default=["query", "joint", "cross", "add"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pool", type=int, default=10_000, help="training images that draws are made from")
    given = parser.parse_args()
    classes = open_dataset(given.data).classes
    classifier = parents(given.weights, classes)
    rows, labels = seen(classifier, given.data, "train", given.pool)
    test = seen(classifier, given.data, "test", 10_000)
    found = json.loads(given.out.read_text()) if given.out.exists() else {"draws": []}
    found |= {
        "features": "Images were enlarged as a run does it.",
        "hardware": hardware_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "pool": given.pool,
    }
    for seed in range(given.seeds):
        for count in given.counts:
            if any((d["count"], d["seed"]) == (count, seed) for d in found["draws"]):
                continue
            result = draw(classifier.model, rows, labels, test, count, seed, given.operators)
            found["draws"].append({"count": count, "seed": seed} | result)
            print(found["draws"][-1], flush=True)
            write_json(given.out, found)


if __name__ == "__main__":
    main()
