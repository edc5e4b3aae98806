"""Attention collapse in a few numbers, for a model that is being trained."""

from statistics import fmean
from typing import Any

from torch import Tensor, nn

from tokenfusion.analyze.collapse import measure_collapse


def watch_collapse(model: nn.Module, images: Tensor) -> dict[str, float]:
    """How far a model's attention has collapsed.

    Args:
        model: as in `measure_collapse`; it is left as it was.
        images: (B, in_chans, H, W) as it takes them.

    Returns:
        by name, the undefined left out: `collapse/neighbour_similarity`, of blocks next to each other;
        `collapse/similar_blocks`, the share of blocks that are like at least one other; `collapse/head_similarity` and
        `collapse/entropy`, means over blocks, the entropy in units of uniform attention's; behind the last block
        `collapse/token_similarity` and `collapse/effective_rank`.

    Raises:
        InputError: as in `measure_collapse`.
    """
    values = in_numbers(measure_collapse(model, [images]))
    return {f"collapse/{name}": value for name, value in values.items() if value is not None}


def in_numbers(result: dict[str, Any]) -> dict[str, float | None]:
    """What `measure_collapse` found, a number for each quantity."""
    groups, blocks = result["groups"], result["blocks"]
    heads = [block["head_similarity"] for block in blocks if block["head_similarity"] is not None]
    last = next((block for block in reversed(blocks) if block["token_similarity"] is not None), None)
    return {
        "neighbour_similarity": fmean(value for group in groups for value in group["neighbours"]["1"]),
        "similar_blocks": sum(len(group["similar_blocks"]) for group in groups)
        / sum(len(group["blocks"]) for group in groups),
        "head_similarity": fmean(heads) if heads else None,
        "entropy": fmean(block["entropy"] / block["uniform_entropy"] for block in blocks),
        "token_similarity": last["token_similarity"] if last else None,
        "effective_rank": last["effective_rank"] if last else None,
    }
