"""Data of every kind, made from pictures."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from tokenfusion.data.preprocess import Preprocess
from tokenfusion.data.sampler import ShardOrder, Share

Tree = dict[str, np.ndarray]
LIMIT = 10_000
"""Pixels, more than any picture here has."""


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(source: Any, index: int) -> np.ndarray:
    return source.decode(index, LIMIT).permute(1, 2, 0).numpy()


def write_parquet(
    path: Path,
    files: list[bytes | None],
    labels: list[Any],
    names: list[str] | None = None,
    image: str = "img",
    **columns: Any,
) -> None:
    """A file as the Hugging Face library writes it, two images per row group; without its metadata if names is None."""
    images = pa.array(
        [{"bytes": data, "path": None} for data in files], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table = pa.table({image: images, "label": labels, **columns})
    if names is not None:
        features = {image: {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


def write_tar(path: Path, tree: Tree, top: str = "") -> Path:
    with tarfile.open(path, "w:" + {".tgz": "gz", ".gz": "gz", ".xz": "xz"}.get(path.suffix, "")) as tar:
        for name, pixels in tree.items():
            add(tar, top + name, png(pixels))
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def plain(img_size: tuple[int, int], in_chans: int = 3, crop_pct: float = 1.0) -> Preprocess:
    return Preprocess(img_size, in_chans, (0.5,) * in_chans, (0.25,) * in_chans, crop_pct)


def batches_of(order: ShardOrder, share: Share = Share(), epoch: int = 0, start: int = 0) -> list[list[int]]:  # noqa: B008
    order.share, order.epoch, order.start = share, epoch, start
    return [[index for _, index in batch] for batch in order]
