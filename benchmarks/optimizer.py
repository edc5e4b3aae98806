"""Held-out accuracy after an epoch or more of CIFAR-10 by optimiser and peak learning rate, all else equal.

    python benchmarks/optimizer.py ../shared/data/cifar10 --out benchmarks/results/optimizer.json

The figures behind `optimizer = "muon"` as the default of the recipe.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import environment
from tokenfusion.files import write_json
from tokenfusion.history import read_history

RATES = (1e-3, 2e-3, 6e-3)
OPTIMIZERS = ("muon", "adamw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="as `tokenfusion train` takes it")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--model", default="tokenfusion_layerwise_micro")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    result: dict[str, Any] = {**environment(), "model": options.model, "epochs": options.epochs, "results": []}
    for optimizer in OPTIMIZERS:
        for rate in RATES:
            for seed in range(options.seeds):
                with tempfile.TemporaryDirectory() as folder:
                    run = Path(folder) / "run"
                    words = [
                        *(sys.executable, "-m", "tokenfusion", "train", options.data, "--out", str(run)),
                        *("--model", options.model, "--epochs", str(options.epochs), "--warmup-epochs", "0.3"),
                        *("--optimizer", optimizer, "--lr", str(rate), "--seed", str(seed)),
                    ]
                    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
                    last = read_history(run)[-1]
                row = {"optimizer": optimizer, "lr": rate, "seed": seed}
                row |= {key: last[key] for key in ("train_loss", "val_loss", "val_top1", "images_per_s")}
                result["results"].append(row)
                print(row, flush=True)
                write_json(options.out, result)


if __name__ == "__main__":
    main()
