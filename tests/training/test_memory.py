"""What training holds in memory, as the operating system counts it."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from children import begin_command

IMAGES = 640
CIFAR10 = 60_000


def test_the_micro_model_trains_on_cifar10_in_less_than_2_gb(tmp_path):
    """As many images as take seconds are trained on; what the others would add is their decoded size."""
    images = []
    for shade in range(10):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (25 * shade, 0, 0)).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    column = pa.array(images * (IMAGES // 10), type=pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    labels = pa.array([*range(10)] * (IMAGES // 10))
    folder = tmp_path / "images"
    folder.mkdir()
    pq.write_table(pa.table({"image": column, "label": labels}), folder / "train.parquet")
    words = ["train", folder, "--out", tmp_path / "run", "--model", "tokenfusion_layerwise_micro"]
    words += ["--batch-size", 128, "--epochs", 1, "--ema", 0.99]
    process = begin_command(tmp_path / "said.txt", *words)
    process.join()
    assert process.exitcode == 0, (tmp_path / "said.txt").read_text()
    peak = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["peak_memory_mb"] * 2**20
    assert peak + (CIFAR10 - IMAGES) * 3 * 32 * 32 < 2e9
