"""What README says of sizes, from `benchmarks/results/install.json`."""

import json
from pathlib import Path

INSTALL = Path(__file__).parents[1] / "benchmarks" / "results" / "install.json"


def install() -> str:
    """What an installation takes on disk, and what it takes where there is no GPU."""
    whole = json.loads(INSTALL.read_text())["rows"][-1]
    size, for_gpus = whole["mb"] / 1000, whole["mb_for_gpus"] / 1000
    return (
        f"On Linux pip's PyTorch is built for NVIDIA's GPUs: all three extras take {size:.1f} GB of disk, "
        f"{for_gpus:.1f} GB of it for GPUs alone. Where there is none,\n"
        "PyTorch's CPU build, installed beforehand ([how](https://pytorch.org/get-started/locally/): choose CPU), "
        f"leaves {size - for_gpus:.1f} GB at most."
    )
