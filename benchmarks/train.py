"""Train a recipe by the command, as a user would, and write down what it reached and what it cost.

    python benchmarks/train.py recipes/cifar10_micro.toml ../shared/data/cifar10 --run runs/cifar10 \
        --out benchmarks/results/cifar10_micro.json

Minutes are wall time of the whole `tokenfusion train` process: imports, reading the images and held-out evaluation
after every epoch included. Memory is that process's peak.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from common import environment
from tokenfusion.files import write_json
from tokenfusion.history import read_history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data", help="as `tokenfusion train` takes it")
    parser.add_argument("--run", type=Path, required=True, help="run folder to write")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    options, extra = parser.parse_known_args()

    result = environment()  # before anything loads the machine
    command = [
        sys.executable,
        "-m",
        "tokenfusion",
        "train",
        options.data,
        "--recipe",
        options.recipe,
        "--out",
        options.run,
    ]
    start = time.perf_counter()
    subprocess.run([*map(str, command), *extra], check=True)
    minutes = (time.perf_counter() - start) / 60
    memory_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    subprocess.run([sys.executable, "-m", "tokenfusion", "evaluate", str(options.run)], check=True)

    evaluation = json.loads((options.run / "evaluation.json").read_text())
    model = json.loads((options.run / "model.json").read_text())
    epochs = read_history(options.run)
    kept = ("n", "top1", "top1_ci95", "top5", "loss", "ece", "skipped", "split")
    result |= {
        "minutes": minutes,
        "peak_memory_mb": memory_mb,
        "evaluation": {key: evaluation[key] for key in kept},
        "model": {key: model[key] for key in ("name", "parameters", "macs", "preprocess")},
        "recipe": tomllib.loads((options.run / "recipe.toml").read_text()) | {"data": Path(options.data).name},
        "epochs": epochs,
    }
    write_json(options.out, result)
    print(json.dumps({key: result[key] for key in ("minutes", "peak_memory_mb", "evaluation")}, indent=2))


if __name__ == "__main__":
    main()
