"""What `docs/stages.md` tells of two pretrained parents, from what `benchmarks/pretrained.py` writes."""

from statistics import fmean, stdev
from typing import Any

from results_page import load, load_before, table
from scipy.stats import t

from tokenfusion.models.operators import OPERATORS

WAYS = {
    "cnn": "CNN",
    "vit": "transformer",
    "both": "both",
    "mean": "mean of the two",
    "cnn_tokens": "CNN by tokens",
    "vit_tokens": "transformer by tokens",
    "mean_tokens": "mean of the two by tokens",
    "larger_260": "larger CNN, 260 px",
    "larger_384": "larger CNN, 384 px",
    "sklearn": "scikit-learn",
    "votes": "token votes",
}
"""Ways to name an image by what two parents see, and their headings."""
TUNED = {"votes": "token votes", "all": "pair, all weights", "fine_tuned": "CNN, all weights"}
"""What training all weights is held against, and its headings."""
RIVALS = {
    "both": "over both",
    "mean": "over the mean",
    "mean_tokens": "over the mean by tokens",
    "larger_260": "over larger, 260 px",
    "larger_384": "over larger, 384 px",
}


def pretrained(name: str = "pretrained") -> str:
    """What two pretrained parents know, and what their tokens' votes add, by the number of training images."""
    found = load(name)
    ways = {way: heading for way, heading in WAYS.items() if any(way in draw for draw in found["draws"])}
    rivals = {way: heading for way, heading in RIVALS.items() if way in ways}
    rows = []
    for count, draws in draws_by_count(found):
        row = [f"{count:,}", str(len(draws))]
        row += [f"{fmean(d[way] for d in draws):.2%}" if have(draws, way) else "–" for way in ways]
        rows.append(row + [signed(gain("votes", rival, draws)) for rival in rivals])
    heading = ["training images", "draws", *ways.values(), *rivals.values()]
    judged = f"top-1 on {found['test_images']:,} test images"
    notes = [f"Training images are drawn from {found['pool']:,}; {judged}. {found['features']}"]
    each = {way: [gain("votes", way, draws) for _, draws in draws_by_count(found)] for way in rivals}
    beaten = [way for way, gains in each.items() if all(one is None or one[0] > 0 for one in gains)]
    close = [ways[way] for way in rivals if way not in beaten]
    more = "; ".join(ways[way] for way in beaten)
    notes += [f"Token votes name more, with intervals above 0 in every row that has both, than: {more}."] * bool(beaten)
    notes += [f"Not in every row more than: {'; '.join(close)}."] * bool(close)
    return "\n\n".join(
        [table(heading, rows) + "\n\n" + "\n".join(notes), *trained_operators(found), *fine_tuning(found)]
    )


def trained_operators(found: dict[str, Any]) -> list[str]:
    """What training an operator on kept tokens adds to the votes; nothing where none was trained."""
    rows, told, image = [], [], 100 / found["test_images"]
    for count, draws in draws_by_count(found):
        gains = {operator: gain(operator, "votes", draws) for operator in OPERATORS}
        if any(gains.values()):
            trained = [draw for draw in draws if OPERATORS.keys() & draw.keys()]
            rows.append([f"{count:,}", str(len(trained)), *map(signed, gains.values())])
            told += [f"`{name}` with {count:,} images" for name, one in gains.items() if one and one[0] > image]
    if not rows:
        return []
    above = f"above one test image, {image:.2f} points: "
    verdict = f"Intervals {above}{', '.join(told)}." if told else f"No interval is {above}the votes alone do as well."
    heading = ["training images", "draws", *(f"`{operator}`" for operator in OPERATORS)]
    return [
        "What fuses, trained on kept tokens from the votes on, by operator: points over the votes.",
        table(heading, rows),
        verdict,
    ]


def fine_tuning(found: dict[str, Any]) -> list[str]:
    """What training all weights gives, of the pair and of the CNN alone; nothing where neither was."""
    rows = []
    for count, draws in draws_by_count(found):
        tuned = [draw for draw in draws if "all" in draw or "fine_tuned" in draw]
        if tuned:
            cells = [f"{fmean(d[way] for d in tuned):.2%}" if have(tuned, way) else "–" for way in TUNED]
            minutes = f"{fmean(d['all_seconds'] for d in tuned) / 60:.1f}" if have(tuned, "all") else "–"
            alone = f"{fmean(d['fine_tuned_minutes'] for d in tuned):g}" if have(tuned, "fine_tuned") else "–"
            rows.append([f"{count:,}", str(len(tuned)), *cells, minutes, alone])
    if not rows:
        return []
    heading = ["training images", "draws", *TUNED.values(), "minutes of the pair", "minutes of the CNN"]
    return [
        "All weights trained: the pair's from the votes on, as `--tune all` does it (its minutes with those of "
        "judging); the CNN's alone as timm's `train.py` does it. Minutes of a core's time.",
        table(heading, rows),
    ]


def cost() -> str:
    """What 5,000 images of 112 px cost from files to an evaluated classifier, beside the aim."""
    found = load("folder")
    (row,) = (row for row in found["rows"] if row["options"] == "--img-size 112")
    minutes = (row["seconds"]["train"] + row["seconds"]["evaluate"]) / 60
    memory = max(row["peak_mb"][verb] for verb in ("train", "evaluate")) / 1000
    deep = "fusion was tried" if "fusion on trial" in row["stages"]["seconds"] else "the linear classifier on means"
    reached = "reached" if minutes < 6 and memory < 3 else "missed"
    return (
        f"{row['photographs']:,} photographs at 112 px, by `train` and `evaluate` with the weights at hand: "
        f"{minutes:.1f} minutes and {memory:.1f} GB (aim: less than 6 and 3, {reached}), as deep as `auto` goes "
        f"({deep}), on {found['hardware']}.{load_before(found)}"
    )


def draws_by_count(found: dict[str, Any]) -> list[tuple[int, list[dict[str, Any]]]]:
    """Draws of training images by how many these are."""
    draws = found["draws"]
    return [(count, [d for d in draws if d["count"] == count]) for count in sorted({d["count"] for d in draws})]


def have(draws: list[dict[str, Any]], way: str) -> bool:
    """Whether a way was measured in all of some draws."""
    return all(way in draw for draw in draws)


def gain(way: str, rival: str, draws: list[dict[str, Any]]) -> tuple[float, float] | None:
    """The 95 % interval, in points, of what a way names more than another, paired by draw, of the draws that have both;
    None where none has."""
    gains = [100 * (draw[way] - draw[rival]) for draw in draws if way in draw and rival in draw]
    if not gains:
        return None
    half = t.ppf(0.975, len(gains) - 1) * stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return fmean(gains) - half, fmean(gains) + half


def signed(interval: tuple[float, float] | None) -> str:
    """An interval as its middle and half its width."""
    if interval is None:
        return "–"
    low, high = interval
    return f"{(low + high) / 2:+.2f}" + (f" ± {(high - low) / 2:.2f}" if high > low else "")
