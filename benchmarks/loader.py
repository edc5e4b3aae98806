"""Images per second of the training loader against timm's, same augmentations, batch size and number of workers.

    python benchmarks/loader.py ../shared/data --out benchmarks/results/loader.json

The data folder holds `cifar10/` (Parquet, 32×32) and `imagenette-224.tar` (JPEG, 224×224). Both loaders deliver
normalised float32 batches to this process; both crop at random (area 0.35 to 1, aspect 3/4 to 4/3, bilinear and
antialiased), and flip with probability 1/2. TrivialAugment is left out, for timm has none. What is compared:

- `ours`: decoded images kept as uint8, as training does when they fit in memory;
- `ours_decoding`: the same without a cache, every image decoded in every epoch;
- `timm_decoding`: timm's loader on the encoded bytes, as the Hugging Face library hands them out, at 32 px;
- `timm`: at 32 px from decoded arrays, as torchvision's CIFAR10 keeps them, which spares timm the decoding that ours
  spares itself; at 224 px from an ImageFolder, decoding.

They take turns in one process. A measurement starts when the batches that wait in queues are used up, and goes on over
the borders of epochs, which count.
"""

import argparse
import io
import itertools
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from common import environment
from tokenfusion.data.augment import Augment
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.decoded import read_images
from tokenfusion.data.loader import TrainLoader
from tokenfusion.data.open import open_dataset
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.files import write_json
from tokenfusion.hardware import keep_freed_memory

MEAN, STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
CROP_SCALE, HFLIP = 0.35, 0.5
BATCH_SIZE = 128
Stream = Generator[tuple[Tensor, Tensor], None, None]


class Arrays(TorchDataset[tuple[Any, int]]):
    """Decoded images for timm, as torchvision.datasets.CIFAR10 holds them."""

    transform: Callable[[Image.Image], Any]

    def __init__(self, arrays: np.ndarray, labels: np.ndarray) -> None:
        self.arrays, self.labels = arrays, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


class Encoded(TorchDataset[tuple[Any, int]]):
    """Encoded images for timm, as the Hugging Face library hands them out."""

    transform: Callable[[Image.Image], Any]

    def __init__(self, files: list[bytes], labels: np.ndarray) -> None:
        self.files, self.labels = files, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.open(io.BytesIO(self.files[index])).convert("RGB")), self.labels[index]


def timm_stream(dataset: Any, size: int, workers: int) -> Stream:
    loader = timm.data.create_loader(
        dataset,
        input_size=(3, size, size),
        batch_size=BATCH_SIZE,
        is_training=True,
        scale=(CROP_SCALE, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=HFLIP,
        color_jitter=None,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=workers,
        device=torch.device("cpu"),
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def our_stream(source: Dataset, indices: np.ndarray, size: int, workers: int, cache_bytes: int) -> Stream:
    images, skipped = read_images(source, indices, max_pixels=10**8, cache_bytes=cache_bytes)
    assert not skipped
    assert images.cached == (cache_bytes > 0)
    preprocess = Preprocess((size, size), 3, MEAN, STD)
    augment = Augment((size, size), 3, CROP_SCALE, HFLIP, trivial_augment=False)
    loader = TrainLoader(images, augment, batch_size=BATCH_SIZE, seed=0, workers=workers)
    try:
        for epoch in itertools.count():
            for batch, labels in loader.epoch(epoch):
                yield preprocess.normalize(batch), labels
    finally:
        loader.close()


def rate(stream: Stream, size: int, workers: int, seconds: float) -> float:
    """Images per second, once the batches that were prepared during others' turns are gone."""
    for _ in range(2 * workers + 2):
        images, _ = next(stream)
        assert images.shape == (BATCH_SIZE, 3, size, size)
        assert images.dtype == torch.float32
    count = 0
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        count += len(next(stream)[0])
    return count / passed


def cifar_streams(data: Path, workers: int) -> dict[str, Stream]:
    source = open_dataset(data / "cifar10")
    indices = np.flatnonzero(np.array(source.splits) == "train")
    labels = source.labels[indices]
    arrays = np.stack([source.decode(index, 10**8).permute(1, 2, 0).numpy() for index in indices])
    files = [source.read(index) for index in indices]
    return {
        "ours": our_stream(source, indices, 32, workers, cache_bytes=2**32),
        "ours_decoding": our_stream(source, indices, 32, workers, cache_bytes=0),
        "timm": timm_stream(Arrays(arrays, labels), 32, workers),
        "timm_decoding": timm_stream(Encoded(files, labels), 32, workers),
    }


def imagenette_streams(data: Path, workers: int, folder: Path) -> dict[str, Stream]:
    source = open_dataset(data / "imagenette-224.tar")
    indices = np.flatnonzero(np.array(source.splits) == "train")
    dataset = timm.data.ImageDataset(str(folder / "imagenette-224" / "train"))
    assert len(dataset) == len(indices)
    return {
        "ours": our_stream(source, indices, 224, workers, cache_bytes=2**32),
        "ours_decoding": our_stream(source, indices, 224, workers, cache_bytes=0),
        "timm": timm_stream(dataset, 224, workers),
    }


def measure(streams: dict[str, Stream], size: int, workers: int, repetitions: int, seconds: float) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in streams}
    for repetition in range(repetitions):
        names = list(streams) if repetition % 2 == 0 else list(reversed(streams))
        for name in names:
            rates[name].append(rate(streams[name], size, workers, seconds))
    for stream in streams.values():
        stream.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    decoding = "timm_decoding" if "timm_decoding" in rates else "timm"
    pairs = dict.fromkeys([("ours", decoding), ("ours_decoding", decoding), ("ours", "timm")])
    ratios = {
        f"{ours} / {theirs}": statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))
        for ours, theirs in pairs
    }
    result = {"size": size, "workers": workers, "images_per_second": medians, "ratios": ratios, "all": rates}
    print(
        {name: round(value) for name, value in medians.items()},
        {name: round(value, 2) for name, value in ratios.items()},
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that holds cifar10/ and imagenette-224.tar")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the cores are the workers'; this process does nothing but receive
    keep_freed_memory()  # as training does; timm's batches are allocated in the same process and gain as much
    result: dict[str, Any] = {
        **environment(),
        "batch_size": BATCH_SIZE,
        "crop_scale": CROP_SCALE,
        "hflip": HFLIP,
        "seconds_per_measurement": options.seconds,
        "results": [],
    }
    repeat = (options.workers, options.repetitions, options.seconds)
    result["results"].append(measure(cifar_streams(options.data, options.workers), 32, *repeat))
    with tempfile.TemporaryDirectory() as folder, tarfile.open(options.data / "imagenette-224.tar") as tar:
        tar.extractall(folder, filter="data")
        streams = imagenette_streams(options.data, options.workers, Path(folder))
        result["results"].append(measure(streams, 224, *repeat))
    write_json(options.out, result)


if __name__ == "__main__":
    main()
