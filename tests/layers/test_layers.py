"""Facts about the shared layers, by hand."""

import pkgutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenfusion import layers
from tokenfusion.layers.attend import Attend, SelfAttention, merge_heads, split_heads
from tokenfusion.layers.blocks import Block, PaddedConv
from tokenfusion.layers.positions import PositionTable
from tokenfusion.layers.tokens import grid_of, map_to_tokens, tokens_to_map
from tokenfusion.models.convnet import ConvTrunk


def test_maps_become_tokens_row_by_row():
    feature_map = torch.arange(2 * 3 * 2 * 5).reshape(2, 3, 2, 5)
    tokens = map_to_tokens(feature_map)
    assert torch.equal(tokens[1, 7], feature_map[1, :, 1, 2])  # token 7 of a 2×5 grid: row 1, column 2
    assert torch.equal(tokens_to_map(tokens, (2, 5)), feature_map)


def test_heads_split_and_merge():
    tokens = torch.arange(2 * 3 * 8).reshape(2, 3, 8)
    heads = split_heads(tokens, 4)
    assert torch.equal(heads[1, 2, 0], tokens[1, 0, 4:6])
    assert torch.equal(merge_heads(heads), tokens)


def test_attention_of_one_query_by_hand():
    query = torch.tensor([[[[2.0, 0.0]]]])
    key = torch.tensor([[[[1.0, 5.0], [0.0, 7.0]]]])
    value = torch.tensor([[[[10.0, 0.0], [0.0, 20.0]]]])
    scores = torch.tensor([2 / 2**0.5, 0.0])  # q·k / √2
    weights = scores.exp() / scores.exp().sum()
    torch.testing.assert_close(Attend()(query, key, value)[0, 0, 0], torch.stack([10 * weights[0], 20 * weights[1]]))


def test_the_two_ways_of_attention_agree():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 11, 16) for _ in range(3))
    by_products = Attend()(query.bfloat16(), key.bfloat16(), value.bfloat16()).float()
    torch.testing.assert_close(by_products, Attend()(query, key, value), rtol=0.05, atol=0.02)


def test_attention_is_pytorchs_multi_head_attention():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    tokens = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(tokens), theirs(tokens, tokens, tokens)[0])


def test_a_block_drops_whole_paths():
    torch.manual_seed(0)
    block = Block(12, SelfAttention(12, 3), 2.0, path=0.999999).train()
    tokens = torch.randn(4, 5, 12)
    assert torch.equal(block(tokens), tokens)
    assert not torch.equal(block.eval()(tokens), tokens)


def test_patches_are_linear_maps_of_padded_squares():
    torch.manual_seed(0)
    patches, image = PaddedConv(2, 7, 3, stride=3), torch.randn(1, 2, 5, 4)  # padded to 6×6: four patches
    tokens = map_to_tokens(patches(image))
    assert tokens.shape == (1, 4, 7)
    corner = F.pad(image, (0, 2, 0, 1))[:, :, 3:, 3:].flatten()
    torch.testing.assert_close(tokens[0, 3], patches.weight.flatten(1) @ corner + patches.bias)


def test_positions_are_the_table_on_their_own_grid_and_smooth_on_others():
    positions = PositionTable(1, (3, 4), prefix_tokens=0)
    positions.table.data = torch.arange(3.0).repeat_interleave(4).view(1, 12, 1)  # the row's number
    assert positions((3, 4))[0, :, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    larger = positions((6, 2))[0, :, 0].view(6, 2)
    assert (larger.diff(dim=0) > 0).all()  # still grows down the rows
    assert (larger.diff(dim=1).abs() < 1e-6).all()  # and is the same along them


def test_a_stage_convolves_pools_norms_and_adds_a_convolution():
    torch.manual_seed(0)
    stage = ConvTrunk(3, 6, strides=(1, 2), dims=(9,), depths=(1,)).stages[0].eval()
    entrance, residual = stage
    for conv in (entrance, residual.conv):
        conv.norm.running_var.fill_(4.0)  # so that a norm halves
    feature_map = torch.randn(2, 6, 5, 7)
    pooled = F.max_pool2d(F.conv2d(feature_map, entrance.conv.weight, padding=1), 2, ceil_mode=True)
    entered = (pooled / 2).relu()
    update = (F.conv2d(entered, residual.conv.conv.weight, padding=1) / 2).relu()
    torch.testing.assert_close(stage(feature_map), entered + update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (1, 5)])
def test_trunk_and_patches_agree_on_grids(size):
    trunk = ConvTrunk(3, 4, strides=(2, 2, 2), dims=(5, 6), depths=(1, 2)).eval()
    assert trunk.reductions == (4, 8)
    with torch.no_grad():
        assert tuple(trunk(torch.randn(1, 3, *size)).shape[-2:]) == grid_of(size, 8)


def test_the_layers_load_no_model():
    """Nor timm, which registers the models as soon as it is imported."""
    names = [f"tokenfusion.layers.{module.name}" for module in pkgutil.iter_modules(layers.__path__)]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nprint(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(names) <= set(loaded)
    assert [name for name in loaded if name.startswith(("tokenfusion.models", "timm"))] == []
