"""The data check-up: how long it takes, and which planted faults it finds.

    python benchmarks/check.py ../shared/data/imagenette-160 --images 10000 --out benchmarks/results/check.json

Copies images of the data given into a temporary folder of `train/` and `val/`, scaled to a shorter side of SIDE, and
plants up to PLANTED faults of every kind there. Then `tokenfusion check` runs in a process of its own, and what it
reports is held against what was planted. Recall is the share of faults that are reported under their kind; false
alarms are images that are reported and were not planted, as a share of all sound images. What the data itself holds,
such as true near duplicates, counts as a false alarm. A second run with flipped labels measures what the quick model
finds.
"""

# ruff: noqa: ARG005 - the faults share one signature

import argparse
import csv
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from common import environment
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.open import open_dataset
from tokenfusion.files import write_json

SIDE = 224
"""Shorter side of the images that are checked, in pixels: what decoding them costs depends on it."""
PLANTED = 30
"""Faults of every kind; fewer where there are fewer than SPREAD times as many images."""
SPREAD = 40
FLIPPED = 0.05
"""Share of the labels that are flipped in the second run."""


def as_bytes(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def cropped(image: Image.Image, draw: random.Random) -> Image.Image:
    """Without 5 to 10 % at one to four of its sides."""
    sides = draw.sample(range(4), draw.randint(1, 4))
    cut = [draw.uniform(0.05, 0.10) if side in sides else 0.0 for side in range(4)]
    width, height = image.size
    return image.crop(tuple(round(part) for part in (
        cut[0] * width, cut[1] * height, (1 - cut[2]) * width, (1 - cut[3]) * height
    )))  # fmt: skip


def deep(image: Image.Image) -> bytes:
    return as_bytes(Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257), "PNG")


Make = Callable[[bytes, Image.Image, random.Random], bytes]
DAMAGE: dict[str, tuple[str, Make]] = {
    "truncated": ("unreadable", lambda data, image, draw: data[: int(len(data) * draw.uniform(0.1, 0.9))]),
    "empty": ("unreadable", lambda data, image, draw: b""),
    "not an image": ("unreadable", lambda data, image, draw: draw.randbytes(2000)),
    "tiny": ("tiny", lambda data, image, draw: as_bytes(image.resize((draw.randint(4, 24), draw.randint(4, 24))))),
    "huge": ("huge", lambda data, image, draw: as_bytes(image.resize((2400, 1800)), quality=50)),
    "animated": (
        "animated",
        lambda data, image, draw: as_bytes(image, "GIF", save_all=True, append_images=[ImageOps.flip(image)]),
    ),
    "CMYK": ("odd_colour", lambda data, image, draw: as_bytes(image.convert("CMYK"))),
    "16 bits": ("odd_colour", lambda data, image, draw: deep(image)),
    "palette with transparency": (
        "odd_colour",
        lambda data, image, draw: as_bytes(image.convert("P"), "PNG", transparency=0),
    ),
}
"""Faults that replace a training image: what check.json calls them, and how they are made."""
COPIES: dict[str, tuple[str, Make]] = {
    "exact": ("exact_duplicates", lambda data, image, draw: data),
    "re-encoded": ("near_duplicates", lambda data, image, draw: as_bytes(image, quality=draw.randint(30, 80))),
    "resized": (
        "near_duplicates",
        lambda data, image, draw: as_bytes(image.resize((draw.randint(96, 320), draw.randint(96, 320)))),
    ),
    "cropped": ("near_duplicates", lambda data, image, draw: as_bytes(cropped(image, draw), quality=85)),
}
"""Copies of held-out images that are planted among the training images."""


def scaled(data: bytes) -> bytes:
    """An image file whose shorter side is SIDE; the same where it is already."""
    image = Image.open(io.BytesIO(data))
    factor = SIDE / min(image.size)
    if factor == 1:
        return data
    width, height = image.size
    return as_bytes(image.convert("RGB").resize((round(width * factor), round(height * factor))), quality=90)


def copy(source: Dataset, count: int, folder: Path) -> list[tuple[str, int]]:
    """Write so many images, a fifth of them held out; names and labels."""
    written = []
    for number, index in enumerate(random.Random(0).sample(range(len(source)), count)):
        data = scaled(source.read(index))
        label = int(source.labels[index])
        name = f"{'val' if number % 5 == 0 else 'train'}/{source.classes[label]}/{number:06d}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        written.append((name, label))
    return written


def plant(folder: Path, names: list[str], count: int) -> dict[str, set[str]]:
    """Plant so many faults of every kind; the names planted, by kind."""
    draw = random.Random(1)
    train, val = ([name for name in names if name.startswith(part)] for part in ("train", "val"))
    draw.shuffle(train)
    draw.shuffle(val)
    planted: dict[str, set[str]] = {}
    for kind, (_, make) in (DAMAGE | COPIES).items():
        planted[kind] = set()
        for _ in range(count):
            name, original = take_pair(train, val) if kind in COPIES else (train[-1], train[-1])
            train.remove(name)
            data = (folder / original).read_bytes()
            (folder / name).write_bytes(make(data, Image.open(io.BytesIO(data)).convert("RGB"), draw))
            planted[kind].add(name)
    return planted


def take_pair(train: list[str], val: list[str]) -> tuple[str, str]:
    """A training image and a held-out one of its class, which is taken out of the list."""
    for name in train:
        for original in val:
            if name.split("/")[1] == original.split("/")[1]:
                val.remove(original)
                return name, original
    raise SystemExit("no class has both a training and a held-out image left to plant copies of; give more --images")


def run_check(folder: Path, out: Path) -> tuple[dict[str, Any], float]:
    """What check.json holds, and the seconds that the command took, start and all."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tokenfusion", "check", str(folder), "--out", str(out)], check=True)
    return json.loads((out / "check.json").read_text()), time.perf_counter() - start


def names_in(result: dict[str, Any], field: str) -> set[str]:
    """The images that a kind of finding names."""
    return {image["path"] for found in result[field] for image in found.get("images", [found])}


def judge(result: dict[str, Any], planted: dict[str, set[str]], excluded: set[str], total: int) -> dict[str, Any]:
    """Recall of each kind, and false alarms of each field."""
    fields = {kind: field for kind, (field, _) in (DAMAGE | COPIES).items()}
    recall = {kind: len(names & names_in(result, fields[kind])) / len(names) for kind, names in planted.items()}
    faulty = set().union(*planted.values())
    alarms = {}
    for field in sorted(set(fields.values())):
        true = set().union(*(names for kind, names in planted.items() if fields[kind] == field))
        found = (
            [image["path"] for image in group["images"]] if "images" in group else [group["path"]]
            for group in result[field]
        )
        alarms[field] = sum(not true & set(paths) for paths in found)
    return {
        "recall": recall,
        "near_duplicate_recall": float(np.mean([recall[kind] for kind in ("re-encoded", "resized", "cropped")])),
        "false_findings": alarms,
        "false_alarm_rate": sum(alarms.values()) / (total - len(faulty)),
        "sound_images_quarantined": len(excluded - faulty),
    }


def flip(folder: Path, written: list[tuple[str, int]], classes: tuple[str, ...]) -> set[str]:
    """Move a share of the images into another class's folder; their new names."""
    draw, moved = random.Random(2), set()
    for name, label in draw.sample(written, int(FLIPPED * len(written))):
        other = draw.choice([k for k in range(len(classes)) if k != label])
        target = name.replace(f"/{classes[label]}/", f"/{classes[other]}/")
        (folder / name).rename(folder / target)
        moved.add(target)
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labelled images, such as imagenette-224.tar")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    source = open_dataset(arguments.data)
    if not SPREAD <= arguments.images <= len(source):
        parser.error(f"--images {arguments.images}: {arguments.data} has {len(source)}; give {SPREAD} to {len(source)}")
    planted_of_each = min(PLANTED, arguments.images // SPREAD)
    result = {**environment(), "images": arguments.images, "planted_of_each_kind": planted_of_each}
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "data", Path(scratch) / "found"
        written = copy(source, arguments.images, folder)
        flipped = flip(folder, written, source.classes)
        found, _ = run_check(folder, out)
        disputes = [image["path"] for image in found["labels"]["disputes"]]
        hits = [path in flipped for path in disputes]
        result["labels"] = {
            "flipped": len(flipped),
            "disputed": len(disputes),
            "found": sum(hits),
            "found_among_first_24": sum(hits[:24]),
            "model_accuracy": found["labels"]["model_accuracy"],
        }
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "data", Path(scratch) / "found"
        names = [name for name, _ in copy(source, arguments.images, folder)]
        planted = plant(folder, names, planted_of_each)
        found, seconds = run_check(folder, out)
        with open(out / "quarantine.csv", newline="") as file:
            excluded = {row["path"] for row in csv.DictReader(file)}
        result |= {"seconds": round(seconds, 1), **judge(found, planted, excluded, arguments.images)}
    write_json(arguments.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
