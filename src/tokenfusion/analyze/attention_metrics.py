"""What is measured of attention maps and tokens, as functions of them alone.

Letters: B batch, L blocks, H heads, N query tokens, M key tokens, C channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenfusion.layers.tokens import AttentionLayout, TokenLayout


def cosines(vectors: Tensor) -> Tensor:
    """Cosine similarity of all pairs of L vectors, (..., L, M) to (..., L, L); a zero vector is like none."""
    vectors = vectors.float()
    products = vectors @ vectors.mT
    norms = products.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(products.dtype).tiny).rsqrt()
    return products.mul_(norms[..., None]).mul_(norms[..., None, :])


def block_cosines(maps: Sequence[Tensor]) -> Tensor:
    """Cosine similarity of every token's attention between all pairs of blocks (DeepViT section 3.2).

    Args:
        maps: L maps (B, H, N, M), a block each.

    Returns:
        (B, H, N, L, L).
    """
    by_head = (torch.stack([one[:, head] for one in maps]) for head in range(maps[0].shape[1]))  # (L, B, N, M)
    return torch.stack([cosines(one.movedim(0, 2)) for one in by_head], dim=1)  # a head's maps fit into the cache


def head_cosines(maps: Tensor) -> Tensor:
    """Cosine similarity of every token's attention between all pairs of heads: (B, H, N, M) to (B, N, H, H)."""
    return cosines(maps.transpose(1, 2))


def pairs_of(values: Tensor) -> Tensor:
    """The values of all pairs of two different things: (..., L, L), symmetric, to (..., L(L - 1)/2)."""
    count = values.shape[-1]
    row, column = torch.triu_indices(count, count, offset=1, device=values.device)
    return values[..., row, column]


def entropy(maps: Tensor) -> Tensor:
    """Entropy of every token's attention in nats: (B, H, N, M) to (B, H, N); ln M where it is uniform."""
    maps = maps.float()
    logs = maps.clamp_min(torch.finfo(maps.dtype).tiny).log_()  # torch.special.entr takes twice as long
    return -logs.mul_(maps).sum(-1)


def token_similarity(tokens: Tensor) -> Tensor:
    """Mean cosine similarity of an image's tokens, (B, N, C) to (B,); 1 where all point the same way."""
    count = tokens.shape[1]
    total = F.normalize(tokens.float(), dim=2).sum(1).square().sum(1)  # of all pairs, each token with itself among them
    return (total - count) / (count * (count - 1))


def effective_rank(tokens: Tensor) -> Tensor:
    """How many directions an image's tokens fill: (B, N, C) to (B,).

    The exponential of the entropy of the singular values, scaled to sum to 1 (Roy and Vetterli, EUSIPCO 2007).
    """
    tokens = tokens.double()
    wide = tokens if tokens.shape[1] <= tokens.shape[2] else tokens.mT
    squares = torch.linalg.eigvalsh(wide @ wide.mT).clamp_min(0)
    values = squares.sqrt()
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()


def pixel_distances(layout: AttentionLayout, img_size: tuple[int, int]) -> Tensor:
    """Distance in pixels between the centres of query and key tokens, (N, M); NaN where one has no place."""
    queries, keys = (centres(tokens, img_size) for tokens in layout)
    return (queries[:, None] - keys[None]).square().sum(-1).sqrt()


def centres(tokens: TokenLayout, img_size: tuple[int, int]) -> Tensor:
    """Row and column of each token's centre in pixels, (N, 2); NaN for tokens without a place."""
    places = []
    for group in tokens:
        if group.grid is None:
            places.append(torch.full((group.count, 2), torch.nan))
            continue
        axes = [(torch.arange(n) + 0.5) * (side / n) for n, side in zip(group.grid, img_size, strict=True)]
        places.append(torch.cartesian_prod(*axes))
    return torch.cat(places)


def mean_distance(maps: Tensor, distances: Tensor) -> Tensor:
    """Mean distance that a head looks over, in the unit of the distances (Dosovitskiy et al., arXiv 2010.11929).

    Args:
        maps: (B, H, N, M).
        distances: (N, M), NaN where a token has no place; its attention does not count.

    Returns:
        (B, H); NaN where no two tokens have places.
    """
    flat = maps.float().flatten(2)
    ways = torch.stack([distances.nan_to_num(0), (~distances.isnan()).float()]).flatten(1)
    travelled, weight = (flat @ ways.to(flat).mT).unbind(-1)
    return travelled / weight


def similar_blocks(similarity: Tensor, threshold: float) -> list[int]:
    """Which of L blocks are more similar than the threshold to at least one other, by their similarities (L, L)."""
    others = similarity.clone().fill_diagonal_(-1)
    return torch.nonzero(others.amax(1) > threshold).flatten().tolist()


def repeating_runs(similarity: Tensor, threshold: float) -> list[tuple[int, int]]:
    """First and last of each run of two or more blocks that are each similar to the one before."""
    runs: list[tuple[int, int]] = []
    for block, value in enumerate(similarity.diagonal(1).tolist(), start=1):
        if value <= threshold:
            continue
        if runs and runs[-1][1] == block - 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block - 1, block))
    return runs
