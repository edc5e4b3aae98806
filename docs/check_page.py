"""What `docs/check.md` tells of planted faults and flipped labels, from `benchmarks/results/check.json`."""

from statistics import fmean
from typing import Any

from results_page import load, table

EYES = {"thumbnails": "thumbnails", "parents": "two pretrained parents"}
AIM, LARGE = 0.9, 500
"""Share of so many flips that is to be found."""
SHOWN = (25, 100, 300)
"""Disputes after which precision is told."""


def check() -> str:
    """How long the check-up takes, and what it finds."""
    found = load("check")
    return "\n\n".join([*(faults(name, its) for name, its in found.items() if "faults" in its), labels(found)])


def faults(name: str, found: dict[str, Any]) -> str:
    """What is found of faults planted among one set's images."""
    judged = found["faults"]["thumbnails"]  # the faults are found alike by either
    rows = [[kind, f"{judged['planted'][kind]}", f"{share:.1%}"] for kind, share in judged["recall"].items()]
    text = f"Of faults planted among {found['images']:,} images of {name}, these were found:\n\n"
    text += table(["fault", "planted", "found"], rows)
    text += (
        f"\n\nThe last three are near duplicates, of which {judged['near_duplicate_recall']:.1%} were found (aim: "
        f"99%); {judged['false_alarm_rate']:.1%} of the sound images raised a false alarm (aim: 1% at most)."
    )
    for by, row in found.get("timed", {}).items():
        looked = f", of which {row['feature_seconds']:.0f} s looking" if row.get("feature_seconds") else ""
        load_before = row["load_average_before"]
        text += (
            f" By {EYES[by]} it took {row['seconds']:.1f} s{looked} (aim: 60 s besides looking) and {row['peak_mb']:,} "
            f"MB on {found['hardware']}, at a load of {load_before:.1f} before."
        )
    return text


def labels(found: dict[str, Any]) -> str:
    """Which flipped labels are disputed, by what judges them."""
    rows = []
    for name, its in found.items():
        for by, what in EYES.items():
            runs = [row for row in its["labels"] if row["by"] == by]
            if not runs:
                continue
            shares = [precision(runs, rank) for rank in SHOWN]
            counts = [
                f"{fmean(row[key] for row in runs):,.0f}" for key in ("flipped", "disputed", "found_among_first_600")
            ]
            rows.append([f"{name}, {its['images']:,}", what, str(len(runs)), *counts, *shares])
    heading = ["images", "judged by", "draws", "flipped", "disputed", "flipped among the first 600"]
    heading += [f"flipped of the first {rank}" for rank in SHOWN]
    return (
        "Labels that were flipped at random, and are disputed; in brackets what `check` says, at most:\n\n"
        f"{table(heading, rows)}\n\nThe CNN's weights were trained on most of Imagenette's very images.{aim(found)}"
    )


def aim(found: dict[str, Any]) -> str:
    """Whether nine of ten flipped labels are among a fifth more disputes, of the sets that are large enough to say."""
    told = []
    for name, its in found.items():
        runs = [row for row in its["labels"] if row["by"] == "parents" and row["flipped"] >= LARGE]
        if runs:
            share = fmean(row["found_among_first_600"] / row["flipped"] for row in runs)
            told.append(f"{share:.1%} on {name} ({'reached' if share >= AIM else 'missed'})")
    return f" Aim with two parents: {AIM:.0%} of {LARGE} flips among the first 600: {', '.join(told)}." if told else ""


def precision(runs: list[dict[str, Any]], rank: int) -> str:
    """The share of flipped labels among the first disputes, and the estimate; a dash where a run has fewer."""
    if not all(str(rank) in row["precision"] for row in runs):
        return "–"
    true, said = (fmean(row[key][str(rank)] for row in runs) for key in ("precision", "estimated_precision"))
    return f"{true:.0%} ({said:.0%})"
