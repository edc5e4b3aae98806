"""What a comparison shows, in words: which model is best, and where fusing tokens helps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenfusion.compare.table import corrected_tests, p_text
from tokenfusion.formatting import counted
from tokenfusion.names import is_fused
from tokenfusion.report.page import percent

TIED = 1e-9
"""Below which accuracies, which are steps of 1/n, differ by rounding alone."""
SIGNIFICANT, CLAIM_SEEDS = 0.05, 5
"""Below which p, and from how many seeds on, a difference is called one."""
Row = Mapping[str, Any]
"""One of `models` of `comparison.json`."""


def interval(row: Row) -> tuple[float, float]:
    """The 95 % interval of a model's top-1: over its seeds, or over the images of the only one."""
    low, high = row["top1_ci95"] or row["top1_ci95_images"]
    return low, high


def overlap(one: Row, other: Row) -> bool:
    """Whether two models' intervals have a point in common."""
    (low, high), (other_low, other_high) = interval(one), interval(other)
    return low <= other_high and other_low <= high


def tested(result: Mapping[str, Any], one: Row, other: Row) -> dict[str, Any] | None:
    """The test of two models, if there is one with a p, which is Holm's: all tests are against the first model."""
    first = result["models"][0]["name"]
    names = [row["name"] for row in (one, other)]
    test = corrected_tests(result).get(names[1] if names[0] == first else names[0]) if first in names else None
    return test if test and test["p"] is not None else None


def told_apart(result: Mapping[str, Any], one: Row, other: Row) -> bool:
    """Whether two models differ by more than chance: by their test, or where there is none, by intervals apart."""
    test = tested(result, one, other)
    return test["p"] < SIGNIFICANT if test else not overlap(one, other)


def rank(result: Mapping[str, Any]) -> list[Row]:
    """The models that have a finished run, best first."""
    return sorted((row for row in result["models"] if row["runs"]), key=lambda row: -row["top1_mean"])


def headline(result: Mapping[str, Any]) -> str:
    """Which model is best and by how much, over the next, the first and all the others; and what is not known.

    Args:
        result: what `comparison.json` holds.
    """
    ranked = rank(result)
    if not ranked:
        return " ".join(["No model of this comparison has a finished run.", *cautions(result)])
    best, *others = ranked
    images = best["runs"][0]["n"]
    spread = "" if best["top1_sd"] is None else f" ± {percent(best['top1_sd'], 2)}"
    reached = f"names {percent(best['top1_mean'], 2)}{spread} of {counted(images, 'image')} correctly"
    if not others:
        return " ".join([f"Only {best['name']} has finished runs: it {reached}.", *cautions(result)])
    level = [row for row in others if best["top1_mean"] - row["top1_mean"] < TIED]
    ahead = f"{best['name']} is ahead: it"
    if level:
        ahead = f"{listed(row['name'] for row in [best, *level])} are level ahead: each"
    sentences = [f"Of the {len(ranked)} models with finished runs, {ahead} {reached}."]
    nearest, first = others[len(level) : len(level) + 1], result["models"][0]
    sentences += [f"The next is {row['name']}, {distance(result, row, best)}." for row in nearest]
    if not first["runs"]:
        sentences.append(f"{first['name']}, with which tests compare, has no finished run.")
    elif first not in (best, *level, *nearest):
        sentences.append(f"{first['name']}, which was named first, is {distance(result, first, best)}.")
    if len(others) > 1:
        close = [row["name"] for row in others if not told_apart(result, best, row)]
        sentences.append(f"Not told apart from it: {listed(close) or 'none'}.")
    return " ".join([*sentences, *cautions(result)])


def distance(result: Mapping[str, Any], row: Row, best: Row) -> str:
    """How far a model is below the best, and whether that is more than chance."""
    gap = best["top1_mean"] - row["top1_mean"]
    far = f"{100 * gap:.2f} percentage points below" if gap > TIED else "level with it"
    test = tested(result, row, best)
    if test is None:
        return f"{far}; their 95% intervals {'overlap' if overlap(row, best) else 'do not overlap'}, without a test"
    found = "more than chance" if told_apart(result, row, best) else "no difference can be told"
    return f"{far}: {found} (p {p_text(test['p'])}, {test['method']})"


def cautions(result: Mapping[str, Any]) -> list[str]:
    """What the figures do not tell."""
    seeds, models, ranked = len(result["seeds"]), result["models"], rank(result)
    failed = sum(len(row["failed"]) for row in models)
    left = len(models) * seeds - sum(len(row["runs"]) for row in models) - failed
    sentences = []
    if failed:
        sentences.append(f"{counted(failed, 'run')} failed.")
    if left > 0:
        sentences.append(f"{counted(left, 'run')} still to do.")
    single, double = ([row["name"] for row in ranked if len(row["runs"]) == count] for count in (1, 2))
    if single and len(single) == len(ranked):
        sentences.append("Of one seed the intervals are over images alone: they do not tell what another seed gives.")
    elif single:
        sentences.append(
            f"Intervals are of different kinds: of {listed(single)}, with one finished run, over images alone, which "
            "does not tell what another seed gives; of the others over seeds."
        )
    if 1 < max((len(row["runs"]) for row in ranked), default=0) < CLAIM_SEEDS:
        sentences.append(f"Fewer than {CLAIM_SEEDS} seeds: a hint, no claim rests on it.")
    if double:
        whose = "" if len(double) == len(ranked) else f" ({listed(double)})"
        sentences.append(
            f"Of two seeds{whose} an interval is 9 standard deviations to either side, so that most overlap."
        )
    return sentences


def fusion_against_others(result: Mapping[str, Any]) -> list[str]:
    """Of each fused model, best first, whether it is better than its controls and than models that fuse nothing.

    Better and worse are those told apart from it (`told_apart`); gains are in percentage points.

    Args:
        result: what `comparison.json` holds.
    """
    ranked = rank(result)
    said = []
    for fused in (row for row in ranked if is_fused(row["name"])):
        rivals = [row for row in ranked if is_rival(row, fused["name"])]
        if not rivals:
            continue
        unclear = [row for row in rivals if not told_apart(result, row, fused)]
        clear = [row for row in rivals if told_apart(result, row, fused)]
        groups = {
            "It is better than": [row for row in clear if row["top1_mean"] < fused["top1_mean"]],
            "Not told apart from": unclear,
            "It is worse than": [row for row in clear if row["top1_mean"] > fused["top1_mean"]],
        }
        better = len(groups["It is better than"])
        which = {0: "none", len(rivals): "all"}.get(better, str(better))
        models = f"{which} of the {counted(len(rivals), 'model')} compared with it"
        sentences = [f"{fused['name']}, {percent(fused['top1_mean'], 2)}, is better than {models}."]
        sentences += [
            f"{words} {listed(name_with_gain(row, fused) for row in rows)}." for words, rows in groups.items() if rows
        ]
        said.append(" ".join([*sentences, *on_sides(fused)]))
    return said


def on_sides(fused: Row) -> list[str]:
    """Which of a fused model's sides it can do without, if any, where that was measured."""
    idle = [side["tokens"] for side in fused.get("sides", []) if side["ci95"] and side["ci95"][0] <= 0]
    return [
        f"Its {tokens} tokens are worth nothing that could be told: it is as right without them." for tokens in idle
    ]


def is_rival(row: Row, fused: str) -> bool:
    """Whether a model is a control of the fused one, or fuses nothing and is no other model's control."""
    roles = row["role"].split("; ")
    if any(role.endswith(f" of {fused}") for role in roles):
        return True
    asked_for = any(role == "model" or role.startswith("member of ") for role in roles)
    return asked_for and not is_fused(row["name"])


def name_with_gain(row: Row, fused: Row) -> str:
    """A rival with its role, what the fused model gains over it, and its cost where that is another one."""
    roles = [role.removesuffix(f" of {fused['name']}") for role in row["role"].split("; ")]
    own = [role for role in roles if role not in row["role"].split("; ")]
    gain = f"{100 * (fused['top1_mean'] - row['top1_mean']):+.2f}"
    ratio = row["macs"] / fused["macs"]
    cost = [f"at {ratio:.2f}× the multiply-adds"] if abs(ratio - 1) > 0.1 else []
    return f"{row['name']} ({', '.join([*own, gain, *cost])})"


def listed(words: Iterable[str]) -> str:
    """Words as a sentence lists them."""
    several: Sequence[str] = list(words)
    return " and ".join([", ".join(several[:-1]), several[-1]] if len(several) > 1 else several)
