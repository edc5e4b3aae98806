"""What looking at the checksums costs: weights loaded with and without, and the kept rows of frozen parents.

    python benchmarks/checksum.py --out benchmarks/results/checksum.json

The figures behind `checkpoint.checksum` and `features.whole_rows`, in milliseconds of processor time, a single thread.
Files are in the page cache, where a checksum weighs most: from a disk, reading takes longer.
"""

import argparse
import json
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from common import environment, time_in_turns
from tokenfusion.checkpoint import checksum, load_tensors, save_tensors
from tokenfusion.features import BLOCK, whole_rows
from tokenfusion.files import write_json
from tokenfusion.models import create_model

MODELS = ("tokenfusion_early_micro", "tokenfusion_early_tiny", "vit_base_patch16_224")
ROWS, LENGTH = 50_000, 2 * 384
"""Kept rows as many as CIFAR-10 has training images, of the usual length of a pair's."""


def read_alone(path: Path) -> dict[str, Tensor]:
    """A file's tensors, each copied out of it, unchecked."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def measure_weights(name: str, folder: Path, repetitions: int) -> dict[str, float]:
    """Milliseconds to read a model's weights, to look at their checksum, and to build the model."""
    path = folder / "model.safetensors"
    save_tensors(path, create_model(name).state_dict())
    tensors = read_alone(path)
    ways = {
        "read_ms": lambda: read_alone(path),
        "read_and_check_ms": lambda: load_tensors(path),
        "checksum_ms": lambda: checksum(tensors),
        "build_model_ms": lambda: create_model(name),
    }
    return {"megabytes": path.stat().st_size / 1e6} | time_in_turns(ways, repetitions, clock=time.process_time)


def measure_rows(folder: Path, repetitions: int) -> dict[str, float]:
    """Milliseconds to look at the checksums of kept rows."""
    path = folder / "rows.f16"
    rows = np.random.default_rng(0).standard_normal((ROWS, LENGTH), dtype=np.float32).astype(np.float16)
    rows.tofile(path)
    blocks = [zlib.crc32(rows[start : start + BLOCK].tobytes()) for start in range(0, ROWS, BLOCK)]
    write_json(path.with_suffix(".json"), blocks)
    assert whole_rows(path, rows.shape) == ROWS
    ways = {"check_ms": lambda: whole_rows(path, (ROWS, LENGTH))}
    return {"megabytes": path.stat().st_size / 1e6} | time_in_turns(ways, repetitions, clock=time.process_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = environment()
    with tempfile.TemporaryDirectory() as folder:
        result["weights"] = {name: measure_weights(name, Path(folder), options.repetitions) for name in MODELS}
        result["kept_rows"] = measure_rows(Path(folder), options.repetitions)
    print(json.dumps(result, indent=2))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
