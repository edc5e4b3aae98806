"""What a fused run's parents know alone, what fusing them adds, and whether it is worth it: for the report."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokenfusion.errors import InputError
from tokenfusion.files import read_csv
from tokenfusion.json_files import AGAIN, read_json, require
from tokenfusion.models.cost import count_macs
from tokenfusion.models.expressions import parse
from tokenfusion.report.page import percent
from tokenfusion.report.run_folder import Results

WAYS = {"cnn": "CNN alone", "vit": "Transformer alone", "both": "Both, one classifier", "mean": "Mean of the two"}
"""Columns of parents.csv, and their headings."""
RUN = "This run"
CHANCE = 0.05
"""Probability below which a difference is not called chance."""
FEW = 100
"""Held-out images below which a verdict is called preliminary."""
STAGES = {"probe": "the linear classifier", "fusion": "fusion on kept tokens", "all": "fine-tuning of all weights"}


@dataclass(frozen=True)
class Parents:
    """What the report says of parents.

    Attributes:
        verdict: whether fusing is worth it, in sentences.
        ways: heading, right answers and their share of each way to use the parents, the run last.
        classes: name, images, and the share that each way finds, in the order of `ways`.
        notes: further sentences: stages, tokens, cost.
    """

    verdict: str
    ways: list[tuple[str, int, float]]
    classes: list[tuple[str, int, list[float]]]
    notes: list[str]


def parents_of(results: Results) -> Parents | None:
    """What is known of a run's parents; None where it has none, or was judged on other images than they were.

    Raises:
        InputError: parents.csv is damaged.
    """
    path = results.run / "parents.csv"
    if not path.is_file() or results.evaluation is None:
        return None
    rows = {row["path"]: row for row in read_csv(path, ("path", "label", *WAYS))}
    if rows.keys() != {row.path for row in results.predictions}:
        return None
    labels = np.array([row.label for row in results.predictions])
    answers = {way: np.array([rows[row.path][way] for row in results.predictions]) for way in WAYS}
    right = {heading: answers[way] == labels for way, heading in WAYS.items()}
    right[RUN] = np.array([row.prediction for row in results.predictions]) == labels
    ways = [(heading, int(hits.sum()), float(hits.mean())) for heading, hits in right.items()]
    classes = [
        (name, int(members.sum()), [float(hits[members].mean()) for hits in right.values()])
        for name in results.model["classes"]
        if (members := labels == name).any()
    ]
    notes = [*class_notes(classes), *stage_notes(results), *token_notes(results), *cost_notes(results)]
    return Parents(verdict(right), ways, classes, notes)


def verdict(right: dict[str, np.ndarray]) -> str:
    """Whether fusing is worth it, from which images each way names correctly."""
    alone = [WAYS["cnn"], WAYS["vit"]]
    best = max(alone, key=lambda heading: right[heading].sum())
    gain, chance = difference(right[RUN], right[best])
    count, name = len(right[RUN]), best.removesuffix(" alone")
    known = f"The {name} alone names {right[best].sum()} of {count} images correctly, this run {right[RUN].sum()}"
    mean_gain, mean_chance = difference(right[RUN], right[WAYS["mean"]])
    if gain > 0 and chance < CHANCE:
        beyond = mean_gain > 0 and mean_chance < CHANCE
        mean = (
            "and more than the mean of the parents' predictions too"
            if beyond
            else (f"but the mean of the parents' predictions names {right[WAYS['mean']].sum()}: maybe by chance")
        )
        return f"Fusing is worth it here: {known[0].lower()}{known[1:]} ({likely(chance)}), {mean}."
    reason = "this run is no better" if gain <= 0 else f"so small a difference may be chance ({likely(chance)})"
    few = f" {count} images are few to judge by: with more the verdict may be another." * (count < FEW)
    return f"Fusing is not worth it here. {known}: {reason}. The {name} alone would cost less.{few}"


def difference(one: np.ndarray, other: np.ndarray) -> tuple[int, float]:
    """How many more images one names correctly than the other, and how often chance gives as much (McNemar, exact)."""
    from scipy.stats import binomtest

    gained, lost = int((one & ~other).sum()), int((other & ~one).sum())
    chance = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return gained - lost, float(chance)


def likely(chance: float) -> str:
    return f"p = {chance:.2g}, McNemar's test"


def class_notes(classes: Sequence[tuple[str, int, list[float]]]) -> list[str]:
    """On which classes fusing adds most, and on which it takes."""
    gains = [(shares[-1] - max(shares[:2]), name) for name, _, shares in classes]
    added = ", ".join(f"“{name}” ({gain * 100:+.0f} points)" for gain, name in sorted(gains)[::-1][:3] if gain > 0)
    lost = ", ".join(f"“{name}” ({gain * 100:+.0f})" for gain, name in sorted(gains)[:3] if gain < 0)
    notes = [f"Against the better parent of each class it adds most on {added}."] if added else []
    return notes + ([f"It loses on {lost}."] if lost else [])


def stage_notes(results: Results) -> list[str]:
    """What the images that were set aside said of the stages."""
    path = results.run / "stages.json"
    if not path.is_file():
        return []
    found = read_json(path, AGAIN)
    require(found, ("set_aside", "accuracy", "kept"), path)
    scores = ", ".join(f"{STAGES.get(stage, stage)} {percent(score)}" for stage, score in found["accuracy"].items())
    kept = " and ".join(STAGES.get(stage, stage) for stage in found["kept"]) or "nothing beyond the linear classifier"
    return [
        f"Of {found['set_aside']} training images that were set aside, {scores} were named correctly; kept: {kept}."
    ]


def token_notes(results: Results) -> list[str]:
    """Which tokens decide, where `analyze tokens` has measured it."""
    path = results.run / "tokens" / "tokens.json"
    if not path.is_file():
        return [f"Which tokens decide: `{results.command('analyze tokens')}`, then write this report again."]
    found = read_json(path, AGAIN)
    require(found, ("replaced",), path)
    kinds = {"pixel": "the CNN", "patch": "the transformer"}
    lost = [
        f"{kinds[row['tokens']]} sees, accuracy changes by {row['top1_change']['mean'] * 100:+.1f} points"
        for row in found["replaced"]
        if row["tokens"] in kinds and row["layer"] == "whole branch"
    ]
    return [f"Without what {'; without what '.join(lost)} (`analyze tokens`)."] if lost else []


def cost_notes(results: Results) -> list[str]:
    """What each parent costs alone."""
    image = {"in_chans": results.model["preprocess"]["in_chans"]}
    size = tuple(results.model["preprocess"]["img_size"])
    try:
        cnn, vit = (count_macs(name, img_size=size, **image) for name in parse(results.model["name"])[1][:2])
    except (InputError, ValueError):
        return []
    both = results.model["macs"]
    return [
        f"An image costs {both / 1e6:,.1f} million multiply-adds, the CNN alone {cnn / 1e6:,.1f}, "
        f"the transformer alone {vit / 1e6:,.1f}."
    ]
