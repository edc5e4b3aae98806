"""What an analysis found, in words."""

from typing import Any

UNIFORM = 0.98
"""From which share of the largest entropy on attention is called uniform."""


def collapse_summary(result: dict[str, Any]) -> str:
    """A paragraph on what `measure_collapse` found and what to try; blocks are counted from 1 within their group."""
    several = len(result["groups"]) > 1
    sentences = []
    for group in result["groups"]:
        where = f" (of {group['blocks'][0]} to {group['blocks'][-1]})" if several else ""
        sentences += [on_repetition(group, where), *on_mixing(group, result["sample"])]
    if result["not_compared"]:
        sentences.append(f"Not compared, since no other block has their tokens: {', '.join(result['not_compared'])}.")
    sentences += [*on_blocks(result), advice(result)]
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


def on_mixing(group: dict[str, Any], sample: int) -> list[str]:
    before = group["similarity_before_mixing"]
    if before is None:
        return []
    neighbours = [row[i + 1] for i, row in enumerate(before[:-1])]
    mean = sum(neighbours) / len(neighbours)
    return [f"Before Re-attention mixes the heads it is {mean:.2f}, in {sample} of the images."]


def on_blocks(result: dict[str, Any]) -> list[str]:
    sentences, blocks, alike = [], result["blocks"], with_heads_alike(result)
    if alike:
        above = result["thresholds"]["heads"]
        sentences.append(f"In {len(alike)} of {len(blocks)} blocks the heads are alike (above {above}).")
    tokens = [block for block in blocks if block["token_similarity"] is not None]
    if tokens:
        last, rank = tokens[-1], tokens[-1]["effective_rank"]
        sentences.append(
            f"Behind {last['name']} the tokens' mean similarity is {last['token_similarity']:.2f} "
            f"and, in {result['sample']} of the images, their effective rank {rank:.1f}."
        )
    return sentences


def with_heads_alike(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The blocks whose heads are alike."""
    threshold = result["thresholds"]["heads"]
    return [block for block in result["blocks"] if (block["head_similarity"] or 0) > threshold]


def on_features(result: dict[str, Any]) -> list[str]:
    """That there are no feature maps, where there are none: a sentence, or nothing."""
    if result["feature_maps"]:
        return []
    return ["Feature maps are not drawn: no block gives its values by a layer that can be seen."]


def advice(result: dict[str, Any]) -> str:
    blocks = result["blocks"]
    uniform = [block for block in blocks if block["entropy"] > UNIFORM * block["uniform_entropy"]]
    if 2 * len(uniform) > len(blocks):
        return (
            f"In {len(uniform)} of {len(blocks)} blocks attention is almost uniform, as in an untrained model: "
            "such maps are alike whatever the depth, so train first."
        )
    if not any(group["runs"] for group in result["groups"]):
        to_try = ["fewer heads, since those of a block are alike"] if with_heads_alike(result) else []
        if any(group["similar_blocks"] for group in result["groups"]):
            to_try.append("a smaller depth, since blocks apart from each other are similar")
        return f"To try: {', or '.join(to_try)}." if to_try else "Nothing to mend here: no blocks or heads are alike."
    repeated = sum(last - first for group in result["groups"] for first, last in group["runs"])
    if all(block["re_attention"] for block in blocks):
        return f"To try: a depth smaller by {repeated}, or a wider embedding."
    return f"To try: Re-attention in these blocks (deepvit_*), a depth smaller by {repeated}, or a wider embedding."
