"""What is published of the papers' models at 1000 classes, and how a count of ours compares with it.

Figures are written as printed. Their sources: `paper` is the paper itself (top-1 is of ImageNet-1k); `code` was counted
on the paper's public code, a multiply-add being one. Of CrossViT's code the products q kᵀ and map·v were left out of
that count: the tool had no formula for the fused kernel that does them.
"""

from collections.abc import Mapping
from typing import Any

Figures = dict[str, dict[str, str]]  # quantity to source to figure


def crossvit(parameters: str, paper_gmacs: str, code_gmacs: str | None, top1: str) -> Figures:
    """A row of CrossViT's tables."""
    figures: Figures = {"parameters_m": {"code": parameters}, "gmacs": {"paper": paper_gmacs}}
    if code_gmacs:
        figures["gmacs_without_attention"] = {"code": code_gmacs}
    return figures | {"top1": {"paper": top1}}


def deepvit(parameters: str, gmacs: str | None, top1: str) -> Figures:
    """A row of DeepViT's tables."""
    figures: Figures = {"parameters_m": {"code": parameters}}
    if gmacs:
        figures["gmacs"] = {"code": gmacs}
    return figures | {"top1": {"paper": top1}}


PUBLISHED: dict[str, Figures] = {
    "crossvit_tiny_224": crossvit("7.01", "1.6", "1.30", "73.4"),
    "crossvit_small_224": crossvit("26.86", "5.6", "5.09", "81.0"),
    "crossvit_base_224": crossvit("105.03", "21.2", "20.13", "82.2"),
    "crossvit_9_224": crossvit("8.55", "1.8", "1.55", "73.9"),
    "crossvit_15_224": crossvit("27.53", "5.8", "5.17", "81.5"),
    "crossvit_18_224": crossvit("43.27", "9.0", "8.21", "82.5"),
    "crossvit_9_dagger_224": crossvit("8.78", "2.0", "1.68", "77.1"),
    "crossvit_15_dagger_224": crossvit("28.21", "6.1", "5.50", "82.3"),
    "crossvit_18_dagger_224": crossvit("44.27", "9.5", "8.65", "82.8"),
    "crossvit_15_dagger_384": crossvit("28.50", "21.4", "16.07", "83.5"),
    "crossvit_18_dagger_384": crossvit("44.61", "32.4", None, "83.9"),
    "deepvit_16": deepvit("24.43", "5.27", "79.10"),
    "deepvit_24": deepvit("36.26", None, "79.99"),
    "deepvit_32": deepvit("48.10", None, "80.90"),
    "deepvit_s": deepvit("27.31", "6.36", "82.3"),
    "deepvit_l": deepvit("58.88", None, "83.1"),
    "deepvit_l_384": deepvit("59.04", None, "84.25"),
    "cmt_ti": {"parameters_m": {"code": "9.49"}, "gmacs": {"paper": "0.6"}, "top1": {"paper": "79.2"}},
    "cmt_xs": {"parameters_m": {"code": "15.25"}, "gmacs": {"paper": "1.5"}, "top1": {"paper": "81.8"}},
    "cmt_s": {
        "parameters_m": {"paper": "25.1", "code": "26.26"},
        "gmacs": {"code": "4.03"},
        "top1": {"paper": "83.5"},
    },
    "cmt_b": {"parameters_m": {"code": "45.72"}, "gmacs": {"paper": "9.3"}, "top1": {"paper": "84.5"}},
}

COLLAPSE: dict[str, dict[str, str]] = {
    "deepvit_16": {"vit_top1": "78.88", "vit_similar": "5", "similar": "0"},
    "deepvit_24": {"vit_top1": "79.35", "vit_similar": "11", "similar": "0"},
    "deepvit_32": {"vit_top1": "79.27", "vit_similar": "15", "similar": "0"},
}
"""What DeepViT's paper prints of a ViT of the same depth, its top-1 and its similar blocks, and of its own model's."""

TOLERANCE = 0.02


def compare(name: str, ours: Mapping[str, float]) -> dict[str, list[dict[str, Any]]]:
    """The published figures of a model beside ours, by quantity; empty where nothing is published.

    Args:
        name: of a model.
        ours: quantity to number, in the figure's unit; one that is missing, such as top-1, is not compared.

    Returns:
        For each figure its value, as a number and as printed, and its source; if compared, too by how much ours is
        larger (`difference`, a share), whether that is more than 2 % either way (`differs`), and whether ours, rounded
        to as many digits, is the figure (`rounds`).
    """
    return {
        quantity: [
            {"value": float(figure), "printed": figure, "source": source}
            | (difference(ours[quantity], figure) if quantity in ours else {})
            for source, figure in figures.items()
        ]
        for quantity, figures in PUBLISHED.get(name, {}).items()
    }


def difference(ours: float, figure: str) -> dict[str, Any]:
    """How a number of ours differs from a figure."""
    share = ours / float(figure) - 1
    digits = len(figure.partition(".")[2])
    return {"difference": share, "differs": abs(share) > TOLERANCE, "rounds": f"{ours:.{digits}f}" == figure}
