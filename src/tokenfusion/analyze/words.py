"""What an analysis found, in words."""

from collections.abc import Sequence
from typing import Any

UNIFORM = 0.98
"""From which share of the largest entropy on attention is called uniform."""


def describe(result: dict[str, Any]) -> str:
    """A paragraph on what `measure_collapse` found and what to try; blocks are counted from 1 within their group."""
    several = len(result["groups"]) > 1
    sentences = []
    for group in result["groups"]:
        where = f" (of {group['blocks'][0]} to {group['blocks'][-1]})" if several else ""
        sentences += [on_repetition(group, where), *on_mixing(group)]
    if result["not_compared"]:
        sentences.append(f"Not compared, since no other block has their tokens: {', '.join(result['not_compared'])}.")
    sentences += [*on_blocks(result["blocks"], result["thresholds"]["heads"]), advice(result)]
    return " ".join(sentences)


def on_repetition(group: dict[str, Any], where: str) -> str:
    depth, neighbours = len(group["blocks"]), group["neighbours"]["1"]
    mean = sum(neighbours) / len(neighbours)
    likeness = f"neighbouring blocks' attention has a mean cosine similarity of {mean:.2f}"
    if not group["runs"]:
        return f"No block{where} repeats the one before it: {likeness}."
    runs = ", ".join(f"{first + 1}-{last + 1}" for first, last in group["runs"])
    text = f"Blocks {runs} of {depth}{where} repeat each other: {likeness}."
    first, last = group["runs"][-1]
    if last == depth - 1:
        text += f" The last {last - first} of {depth} add little." if last - first > 1 else " The last adds little."
    return text


def on_mixing(group: dict[str, Any]) -> list[str]:
    before = group["similarity_before_mixing"]
    if before is None:
        return []
    neighbours = [row[i + 1] for i, row in enumerate(before[:-1])]
    return [f"Before Re-attention mixes the heads it is {sum(neighbours) / len(neighbours):.2f}."]


def on_blocks(blocks: Sequence[dict[str, Any]], threshold: float) -> list[str]:
    sentences = []
    alike = [block for block in blocks if (block["head_similarity"] or 0) > threshold]
    if alike:
        sentences.append(f"In {len(alike)} of {len(blocks)} blocks the heads are alike (above {threshold}).")
    tokens = [block for block in blocks if block["token_similarity"] is not None]
    if tokens:
        last, rank = tokens[-1], tokens[-1]["effective_rank"]
        sentences.append(
            f"Behind {last['name']} the tokens' mean similarity is {last['token_similarity']:.2f} "
            f"and their effective rank {rank:.1f}."
        )
    return sentences


def advice(result: dict[str, Any]) -> str:
    blocks = result["blocks"]
    uniform = [block for block in blocks if block["entropy"] > UNIFORM * block["uniform_entropy"]]
    if 2 * len(uniform) > len(blocks):
        return (
            f"In {len(uniform)} of {len(blocks)} blocks attention is almost uniform, as in an untrained model: "
            "such maps are alike whatever the depth, so train first."
        )
    if not any(group["runs"] for group in result["groups"]):
        return "Nothing to mend here: depth is used."
    repeated = sum(last - first for group in result["groups"] for first, last in group["runs"])
    if all(block["re_attention"] for block in blocks):
        return f"To try: a depth smaller by {repeated}, or a wider embedding."
    return f"To try: Re-attention in these blocks (deepvit_*), a depth smaller by {repeated}, or a wider embedding."
