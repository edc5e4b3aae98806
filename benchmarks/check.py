"""The data check-up: how long it takes, and which planted faults and flipped labels it finds.

    python benchmarks/check.py ../shared/data/imagenette-160 --pretrained CNN_FILE VIT_FILE --faults \
        --shorter-side 224 --work runs/check --out benchmarks/results/check.json
    python benchmarks/check.py ../shared/data/cifar10 --pretrained CNN_FILE VIT_FILE \
        --work runs/check --out benchmarks/results/check.json

Copies images of the data given into a folder of `train/` and `val/`, and with --faults plants up to PLANTED faults and
COPIED copies of every kind there. For each seed a list gives the same images labels of which FLIPPED are wrong, each
that of another class drawn at random, never those of planted faults. `tokenfusion check` of each list is a process of
its own, by thumbnails and by what pretrained parents see; what it reports is held against what was planted. Recall is
the share of faults that are reported under their kind; false alarms are images that are reported and were not planted,
as a share of all sound images. What the data itself holds, such as true near duplicates and wrong labels of its own,
counts as a false alarm. Seconds are told of a run with --timed alone. What the parents see is kept in the cache, and a
run that was killed goes on with it; rows of the same images that are in the result already are not measured again, and
those of others go. How labels are judged was chosen on other images and other flips: --skip leaves out the images of
the result, --seeds names the flips.
"""

# ruff: noqa: ARG005 - the faults share one signature

import argparse
import csv
import io
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from common import environment
from tokenfusion.data.dataset import Dataset
from tokenfusion.data.open import open_dataset
from tokenfusion.files import write_csv, write_json
from tokenfusion.json_files import read_json

PLANTED = 30
"""Faults of every kind; fewer where there are fewer than SPREAD times as many images."""
COPIED = 100
"""Copies of every kind; fewer where there are fewer than SPREAD times as many images."""
SPREAD = 40
FLIPPED = 0.05
"""Share of the labels that are flipped."""
RANKS = range(25, 601, 25)
"""Disputes after which precision is told."""


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


def scaled(data: bytes, side: int) -> bytes:
    """An image file of that shorter side; the same where it is already, or for side 0."""
    image = Image.open(io.BytesIO(data))
    factor = side / min(image.size)
    if factor in (0, 1):
        return data
    width, height = image.size
    return as_bytes(image.convert("RGB").resize((round(width * factor), round(height * factor))), quality=90)


def copy(source: Dataset, chosen: list[int], side: int, folder: Path) -> dict[str, str]:
    """Write images, a fifth of them held out; their names and classes."""
    written = {}
    for number, index in enumerate(chosen):
        data, label = source.read(index), source.classes[int(source.labels[index])]
        name = f"{'val' if number % 5 == 0 else 'train'}/{label}/{number:06d}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(scaled(data, side))
        written[name] = label
    return written


def plant(folder: Path, names: list[str]) -> dict[str, set[str]]:
    """Plant faults of every kind; the names planted, by kind, and those of which copies were planted as "original"."""
    draw = random.Random(1)
    train, val = ([name for name in names if name.startswith(part)] for part in ("train", "val"))
    draw.shuffle(train)
    draw.shuffle(val)
    planted: dict[str, set[str]] = {"original": set()}
    for kind, (_, make) in (DAMAGE | COPIES).items():
        planted[kind] = set()
        for _ in range(min(COPIED if kind in COPIES else PLANTED, len(names) // SPREAD)):
            name, original = take_pair(train, val) if kind in COPIES else (train[-1], train[-1])
            train.remove(name)
            data = (folder / original).read_bytes()
            (folder / name).write_bytes(make(data, Image.open(io.BytesIO(data)).convert("RGB"), draw))
            planted[kind].add(name)
            planted["original"] |= {original} - {name}
    return planted


def take_pair(train: list[str], val: list[str]) -> tuple[str, str]:
    """A training image and a held-out one of its class, which is taken out of the list."""
    for name in train:
        for original in val:
            if name.split("/")[1] == original.split("/")[1]:
                val.remove(original)
                return name, original
    raise SystemExit("no class has both a training and a held-out image left to plant copies of; give more --images")


def make_data(given: argparse.Namespace, place: Path) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Names and classes of the images that are checked, and what is planted among them; as it was made before."""
    if not (place / "made.json").exists():
        source = open_dataset(given.data)
        last = given.skip + given.images
        if not given.images >= SPREAD or last > len(source):
            sys.exit(f"{given.data} has {len(source)} images; give --images and --skip of as many, {SPREAD} at least")
        chosen = random.Random(0).sample(range(len(source)), len(source))[given.skip : last]
        names = copy(source, chosen, given.shorter_side, place)
        planted = plant(place, list(names)) if given.faults else {}
        write_json(
            place / "made.json", {"names": names, "planted": {kind: sorted(them) for kind, them in planted.items()}}
        )
    made = read_json(place / "made.json", "remove the folder")
    return made["names"], {kind: set(them) for kind, them in made["planted"].items()}


def flip(place: Path, names: dict[str, str], planted: dict[str, set[str]], seed: int) -> tuple[Path, set[str]]:
    """A list of all images in which a share of the sound ones' labels is that of another class; and which ones."""
    draw, classes = random.Random(seed), sorted(set(names.values()))
    sound = sorted(names.keys() - set().union(*planted.values()))
    flipped = set(draw.sample(sound, int(FLIPPED * len(names))))
    given = {
        name: draw.choice([other for other in classes if other != label]) if name in flipped else label
        for name, label in names.items()
    }
    path = place / f"flipped-{seed}.csv"
    write_csv(path, ("path", "label", "split"), ((n, label, n.split("/")[0]) for n, label in given.items()))
    return path, flipped


def run_check(labels: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """What check.json holds, and the most MB of memory that the command held."""
    words = [sys.executable, "-m", "tokenfusion", "check", str(labels), "--out", str(out), *options]
    child = os.posix_spawn(sys.executable, words, os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"tokenfusion check {labels} failed")
    return json.loads((out / "check.json").read_text()) | {"peak_mb": round(usage.ru_maxrss / 1024)}


def names_in(result: dict[str, Any], field: str) -> set[str]:
    """The images that a kind of finding names."""
    return {image["path"] for found in result[field] for image in found.get("images", [found])}


def judge_faults(
    result: dict[str, Any], planted: dict[str, set[str]], excluded: set[str], total: int
) -> dict[str, Any]:
    """Recall of each kind, and false alarms of each field."""
    fields = {kind: field for kind, (field, _) in (DAMAGE | COPIES).items()}
    recall = {kind: len(planted[kind] & names_in(result, field)) / len(planted[kind]) for kind, field in fields.items()}
    faulty = set().union(*(planted[kind] for kind in fields))
    alarms = {}
    for field in sorted(set(fields.values())):
        true = set().union(*(planted[kind] for kind, its in fields.items() if its == field))
        found = (
            [image["path"] for image in group["images"]] if "images" in group else [group["path"]]
            for group in result[field]
        )
        alarms[field] = sum(not true & set(paths) for paths in found)
    near = [kind for kind, (field, _) in COPIES.items() if field == "near_duplicates"]
    return {
        "planted": {kind: len(planted[kind]) for kind in fields},
        "recall": recall,
        "near_duplicate_recall": float(np.mean([recall[kind] for kind in near])),
        "false_findings": alarms,
        "false_alarm_rate": sum(alarms.values()) / (total - len(faulty)),
        "sound_images_quarantined": len(excluded - faulty),
    }


def judge_labels(result: dict[str, Any], flipped: set[str]) -> dict[str, Any]:
    """How many of the flipped labels are disputed, and the precision by rank, as it is and as check estimates it."""
    labels = result["labels"]
    hits = np.cumsum([dispute["path"] in flipped for dispute in labels["disputes"]])
    ranks = [rank for rank in RANKS if rank <= len(hits)]
    return {
        "flipped": len(flipped),
        "disputed": len(hits),
        "found": int(hits[-1]) if len(hits) else 0,
        "found_among_first_600": int(hits[:600][-1]) if len(hits) else 0,
        "precision": {rank: round(int(hits[rank - 1]) / rank, 4) for rank in ranks},
        "estimated_precision": {rank: labels["disputes"][rank - 1]["precision"] for rank in ranks},
        "model_accuracy": labels["model_accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="labelled images, such as imagenette-160")
    parser.add_argument("--pretrained", nargs=2, required=True, help="weights of the CNN and of the transformer")
    parser.add_argument("--img-size", default="112", help="height and width at which the parents look at images")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--skip", type=int, default=0, help="images that are left out before those that are taken")
    parser.add_argument("--shorter-side", type=int, default=0, help="of the images, in pixels; as they are when 0")
    parser.add_argument("--faults", action="store_true", help="plant faults and copies too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the flips")
    parser.add_argument("--timed", action="store_true", help="measure the seconds alone; nothing else may be running")
    parser.add_argument("--work", type=Path, required=True, help="folder of the copies and of what check finds")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write; other data's results in it are kept")
    given = parser.parse_args()
    name = Path(given.data).name
    place = given.work / f"{name}-{given.skip}-{given.images}"
    names, planted = make_data(given, place)
    whole = read_json(given.out, "remove it") if given.out.exists() else {}
    sample = {"images": given.images, "skipped": given.skip}
    if not sample.items() <= whole.get(name, {}).items():  # rows of other images are not gone on with
        whole[name] = environment() | sample | {"labels": []}
    result = whole[name]
    eyes = {"thumbnails": ["--img-size", given.img_size]}
    eyes["parents"] = [*eyes["thumbnails"], "--pretrained", *given.pretrained]
    if given.timed:
        labels, _ = flip(place, names, planted, given.seeds[0])
        for by, options in eyes.items():
            found = run_check(labels, given.work / f"found-{name}-{given.skip}-{by}-timed", options)
            seconds = {key: found[key] for key in ("seconds", "feature_seconds", "peak_mb")}
            result.setdefault("timed", {})[by] = {"load_average_before": os.getloadavg()[0], **seconds}
        write_json(given.out, whole)
        given.seeds = []
    for seed in given.seeds:
        labels, flipped = flip(place, names, planted, seed)
        for by, options in eyes.items():
            row = {"by": by, "img_size": given.img_size, "seed": seed}
            if any(row.items() <= other.items() for other in result["labels"]):
                continue
            out = given.work / f"found-{name}-{given.skip}-{by}-{seed}"
            found = run_check(labels, out, options)
            row |= judge_labels(found, flipped) | {"peak_mb": found["peak_mb"]}
            result["labels"].append(row)
            if planted and seed == given.seeds[0]:
                with open(out / "quarantine.csv", newline="") as file:
                    excluded = {line["path"] for line in csv.DictReader(file)}
                result.setdefault("faults", {})[by] = judge_faults(found, planted, excluded, given.images)
            write_json(given.out, whole)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
