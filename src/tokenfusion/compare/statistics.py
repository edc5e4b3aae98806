"""What several runs of a model say: intervals of differences, tests, and who is not beaten at any cost."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from statistics import fmean, variance
from typing import Any


def paired_t(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Test whether values differ from others that they are paired with, two or more of each.

    Returns:
        `difference_mean`, its 95 % interval `ci95`, the two-sided `p`, and the `method` in words. Where all the
        differences are equal there is no spread to test against: no `ci95`, and no `p` unless all are 0, where it is 1.
    """
    from scipy.stats import ttest_rel

    differences = [a - b for a, b in zip(values, reference, strict=True)]
    if max(differences) - min(differences) < 1e-9:  # accuracies are steps of 1/n, and differ by rounding alone
        return {
            "difference_mean": fmean(differences),
            "ci95": None,
            "p": 1.0 if abs(differences[0]) < 1e-9 else None,
            "method": f"none, the same difference with all of {len(values)} seeds",
        }
    test = ttest_rel(values, reference)
    return {
        "difference_mean": fmean(differences),
        "ci95": list(map(float, test.confidence_interval())),
        "p": float(test.pvalue),
        "method": f"paired t over {len(values)} seeds",
    }


def crossed_t(
    values: Sequence[float],
    reference: Sequence[float],
    per_image: Sequence[float] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Test whether two models differ where every run of either is judged by the same images; fields as in `paired_t`.

    Seeds and images are both random. A seed of one model has nothing to do with the same number of the other, so that
    seeds are not paired, and images are: the variance of the difference is that of either mean over its seeds, as in
    Welch's test, and that of the mean over images. A run's own share is in both, which errs on the side of caution.

    Args:
        values, reference: accuracy of each seed, two or more of each.
        per_image: of each image, the share of seeds that are right less that of the reference's; None where no
            predictions were kept, where images count as given.
        groups: of each image, which show one thing; then whole groups are random, not their images.
    """
    from scipy.stats import t

    parts = [(variance(one) / len(one), len(one) - 1) for one in (values, reference)]
    images = "as given: their predictions were not kept"
    if per_image is not None:
        error2, units = variance_of_mean(per_image, groups or range(len(per_image)))
        parts.append((error2, units - 1))
        images = f"{len(per_image):,} random too" + f", in {units:,} whole groups" * (groups is not None)
    total, mean = sum(part for part, _ in parts), fmean(values) - fmean(reference)
    method = f"t over {len(values)} and {len(reference)} seeds (Welch), images {images}"
    if total < 1e-18:
        return {"difference_mean": mean, "ci95": None, "p": 1.0 if abs(mean) < 1e-9 else None, "method": method}
    freedom, error = total**2 / sum(part**2 / count for part, count in parts if part), math.sqrt(total)
    reach = float(t.ppf(0.975, freedom)) * error
    p = float(2 * t.sf(abs(mean) / error, freedom))
    return {"difference_mean": mean, "ci95": [mean - reach, mean + reach], "p": p, "method": method}


def variance_of_mean(values: Sequence[float], groups: Iterable[Hashable]) -> tuple[float, int]:
    """The variance of values' mean where whole groups of them were drawn, and how many groups there are, two or more.

    Source: Cochran, Sampling Techniques, 1977, section 6.3: the ratio of two totals of clusters.
    """
    mean, sums = fmean(values), dict[Hashable, float]()
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    units = len(sums)
    if units < 2:
        return 0.0, 2
    return units / (units - 1) * sum(total**2 for total in sums.values()) / len(values) ** 2, units


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for how many there are; what is None stays so and does not count.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[place] = largest
    return corrected


def mcnemar(right: Sequence[bool], reference: Sequence[bool]) -> dict[str, Any]:
    """Test whether two runs are right on different numbers of the same images; fields as in `paired_t`.

    The exact test: of the images on which one run alone is right, each is a toss between the two. It knows of no other
    seed, and so says nothing of how the models differ when they are trained anew; `ci95` is of the images alone too.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions, 1947.
    """
    from scipy.stats import binomtest

    from tokenfusion.metrics import t_interval

    ours = sum(a and not b for a, b in zip(right, reference, strict=True))
    theirs = sum(b and not a for a, b in zip(right, reference, strict=True))
    interval = t_interval([float(a) - float(b) for a, b in zip(right, reference, strict=True)])
    return {
        "difference_mean": (ours - theirs) / len(right),
        "ci95": list(interval) if interval and ours + theirs else None,
        "p": float(binomtest(ours, ours + theirs).pvalue) if ours + theirs else 1.0,
        "method": "exact McNemar over the images of one seed",
    }


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names that no other beats in cost or accuracy without losing in the other, cheapest first; equals are all named.

    Args:
        points: (cost, accuracy) by name.
    """
    front: list[str] = []
    last = (-math.inf, -math.inf)
    for name, point in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if point[1] > last[1] or point == last:
            front.append(name)
            last = point
    return front
