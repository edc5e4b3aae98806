"""The quantities of collapse, against cases worked out by hand."""

from math import exp, log, sqrt

import pytest
import torch

from tokenfusion.analyze import attention_metrics as q
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup


def random_maps(batch=2, heads=3, queries=4, keys=5, seed=0):
    return torch.rand(batch, heads, queries, keys, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_identical_blocks_have_similarity_one():
    maps = random_maps()
    similarity = q.block_cosines([maps, maps, maps])
    assert similarity.shape == (2, 3, 4, 3, 3)
    assert similarity.allclose(torch.tensor(1.0))


def test_blocks_that_look_elsewhere_have_similarity_zero():
    one, other = torch.eye(4), torch.eye(4).roll(1, 0)
    similarity = q.block_cosines([one[None, None], other[None, None]])
    assert torch.equal(similarity[0, 0], torch.eye(2).expand(4, 2, 2))


def test_similarity_is_per_image_head_and_token():
    """3-4-5 triangles: the cosine between (3, 4) and (4, 3) is 24/25; with (1, 0) it is 3/5."""
    one = torch.tensor([[[[3.0, 4], [3, 4]], [[1, 0], [0, 2]]]])
    other = torch.tensor([[[[4.0, 3], [1, 0]], [[0, 1], [0, 1]]]])
    similarity = q.block_cosines([one, other])[..., 0, 1]
    torch.testing.assert_close(similarity, torch.tensor([[[24 / 25, 3 / 5], [0, 1]]]))


def test_a_permuted_head():
    """Heads that attend to one token each: after a swap of two of three heads, a third of the pairs is alike."""
    maps = torch.eye(3)[None, :, None]  # head h looks at token h
    similarity = q.block_cosines([maps, maps[:, [1, 0, 2]]])
    assert similarity.mean((0, 1, 2))[0, 1] == pytest.approx(1 / 3)


def test_a_map_of_zeros_is_like_none():
    assert q.cosines(torch.zeros(2, 3)).tolist() == [[0, 0], [0, 0]]


def test_heads_of_a_block():
    maps = torch.tensor([[[[1.0, 0, 0]], [[0, 1, 0]], [[1, 1, 0]]]])  # 3 heads, 1 token
    pairs = q.pairs_of(q.head_cosines(maps))
    torch.testing.assert_close(pairs, torch.tensor([[[0, 1 / sqrt(2), 1 / sqrt(2)]]]))


def test_entropy_of_uniform_and_of_certain_attention():
    maps = torch.tensor([[[[0.25] * 4, [0, 1, 0, 0], [0.5, 0.5, 0, 0]]]])
    torch.testing.assert_close(q.entropy(maps), torch.tensor([[[log(4), 0, log(2)]]]))


def test_token_similarity():
    tokens = torch.tensor([[[2.0, 0], [5, 0], [0, 1]], [[1, 1], [2, 2], [3, 3]]])
    torch.testing.assert_close(q.token_similarity(tokens), torch.tensor([1 / 3, 1.0]))


def test_effective_rank():
    """Singular values (1, 1, 1), (1, 0, 0) and (2, 1, 0), the last with entropy ln 3 - 2/3 ln 2."""
    tokens = torch.stack([torch.eye(3), torch.ones(3, 3), torch.diag(torch.tensor([2.0, 1, 0]))])
    expected = torch.tensor([3, 1, exp(log(3) - 2 / 3 * log(2))], dtype=torch.float64)
    torch.testing.assert_close(q.effective_rank(tokens), expected, rtol=1e-5, atol=1e-5)
    wide = torch.nn.functional.pad(tokens, (0, 4))
    torch.testing.assert_close(q.effective_rank(wide), expected, rtol=1e-5, atol=1e-5)


def test_distances_are_in_pixels_of_either_axis():
    tokens = TokenGroup("cls"), TokenGroup("patch", (2, 3))  # cells of 8×10 pixels in an image of 16×30
    distances = q.pixel_distances(AttentionLayout.among(tokens), (16, 30))
    assert distances[0].isnan().all()
    assert distances[:, 0].isnan().all()
    assert distances[1, 1:].tolist() == pytest.approx([0, 10, 20, 8, sqrt(164), sqrt(464)])


def test_distances_between_two_grids():
    layout = AttentionLayout((TokenGroup("patch", (1, 4)),), (TokenGroup("pooled", (1, 2)),))
    assert q.pixel_distances(layout, (8, 32)).tolist() == [[4, 20], [4, 12], [12, 4], [20, 4]]


def test_mean_distance_leaves_out_tokens_without_a_place():
    distances = torch.tensor([[torch.nan, torch.nan, torch.nan], [torch.nan, 0, 6]])
    maps = torch.tensor([[[[0, 0.5, 0.5], [0.4, 0.4, 0.2]]]])
    assert q.mean_distance(maps, distances).item() == pytest.approx(6 * 0.2 / 0.6)
    assert q.mean_distance(maps[:, :, :1], distances[:1]).isnan().all()


def test_similar_blocks_and_runs():
    similarity = torch.eye(5)
    for one, other in ((0, 3), (1, 2), (3, 4)):
        similarity[one, other] = similarity[other, one] = 0.9
    assert q.similar_blocks(similarity, 0.8) == [0, 1, 2, 3, 4]
    assert q.similar_blocks(similarity, 0.9) == []
    assert q.repeating_runs(similarity, 0.8) == [(1, 2), (3, 4)]
    assert q.repeating_runs(torch.ones(4, 4), 0.8) == [(0, 3)]
