"""What several runs of a model say: intervals over seeds, paired tests, and who is not beaten at any cost."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
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


def mcnemar(right: Sequence[bool], reference: Sequence[bool]) -> dict[str, Any]:
    """Test whether two runs are right on different numbers of the same images; fields as in `paired_t`.

    The exact test: of the images on which one run alone is right, each is a toss between the two. It knows of no other
    seed, and so says nothing of how the models differ when they are trained anew; `ci95` is None.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions, 1947.
    """
    from scipy.stats import binomtest

    ours = sum(a and not b for a, b in zip(right, reference, strict=True))
    theirs = sum(b and not a for a, b in zip(right, reference, strict=True))
    return {
        "difference_mean": (ours - theirs) / len(right),
        "ci95": None,
        "p": float(binomtest(ours, ours + theirs).pvalue) if ours + theirs else 1.0,
        "method": "exact McNemar over the images of one seed",
    }


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names that no other beats in cost or accuracy without losing in the other, cheapest first.

    Args:
        points: (cost, accuracy) by name.
    """
    front: list[str] = []
    best = -math.inf
    for name, (_, accuracy) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if accuracy > best:
            front.append(name)
            best = accuracy
    return front
