"""What the papers' pages tell of published figures, from `tokenfusion.models.published`."""

from results_page import table

from tokenfusion.models.published import COLLAPSE, PUBLISHED


def collapse() -> str:
    """DeepViT beside a ViT of the same depth, as its paper prints them: accuracy, and blocks that attend alike."""
    rows = []
    for name, found in COLLAPSE.items():
        depth, top1 = name.removeprefix("deepvit_"), PUBLISHED[name]["top1"]["paper"]
        rows.append([depth, found["vit_top1"], found["vit_similar"], top1, found["similar"]])
    heading = ["blocks", "ViT, top-1 %", "similar blocks", "DeepViT, top-1 %", "similar blocks"]
    return table(heading, rows)
