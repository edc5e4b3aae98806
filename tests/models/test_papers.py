"""Facts about the parts of CrossViT, DeepViT and CMT; test_contract.py has what every model can do."""

import math
from fractions import Fraction

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenfusion import create_model, list_models
from tokenfusion.errors import InputError
from tokenfusion.layers.attend import SelfAttention
from tokenfusion.layers.cross_attention import ClsCrossAttention
from tokenfusion.layers.positions import PositionTable, RelativePositionTable
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup
from tokenfusion.models.cmt import CMT
from tokenfusion.models.cmt_blocks import InvertedResidualFeedForward, LightweightAttention
from tokenfusion.models.crossvit_fusion import Branch, CrossAttentionWay, Rates, interpolate_patches
from tokenfusion.models.deepvit import (
    BatchNormMixing,
    DeepViT,
    HeadMixing,
    ReAttention,
    RescaledBlock,
    TemperedAttention,
)
from tokenfusion.weights import to_official


@pytest.mark.parametrize(
    ("name", "reductions"), [("crossvit_tiny_224", [12, 17]), ("deepvit_16", [16] * 3), ("cmt_ti", [4, 8, 16, 32])]
)
def test_features_only_through_timm(name, reductions):
    model = timm.create_model(name, features_only=True, img_size=48).eval()
    with torch.no_grad():
        features = model(torch.randn(2, 3, 64, 96))
    assert model.feature_info.reduction() == reductions
    assert [feature.shape[1] for feature in features] == model.feature_info.channels()
    assert [feature.shape[2:] for feature in features] == [(-(-64 // r), -(-96 // r)) for r in reductions]


def test_positions_of_the_trained_grid_are_left_alone_and_others_keep_a_ramp():
    table = PositionTable(2, (4, 6))
    with torch.no_grad():
        table.table[0, 1:, 0] = torch.arange(4.0).repeat_interleave(6)  # the row
        table.table[0, 1:, 1] = torch.arange(6.0).repeat(4)  # the column
    assert table((4, 6)) is table.table
    finer = table((8, 12))
    assert torch.equal(finer[:, :1], table.table[:, :1])
    inside = finer[0, 1:].unflatten(0, (8, 12))[3:5, 5:7]  # away from the edges, interpolation is exact
    torch.testing.assert_close(inside[:, 0, 0], torch.tensor([1.25, 1.75]))
    torch.testing.assert_close(inside[0, :, 1], torch.tensor([2.25, 2.75]))


def test_relative_positions_resize_queries_and_keys_each_on_their_grid():
    table = RelativePositionTable(1, (4, 8), (2, 4))
    rows, keys = torch.arange(4.0).repeat_interleave(8), torch.arange(4.0).repeat(2)
    with torch.no_grad():
        table.table.copy_((10 * rows[:, None] + keys[None])[None])
    bias = table((8, 8), (2, 8)).detach().view(8, 8, 2, 8)
    torch.testing.assert_close(bias[4, 3, 1, 4] - bias[3, 3, 1, 4], torch.tensor(5.0))  # half a row further
    torch.testing.assert_close(bias[4, 3, 1, 4] - bias[4, 3, 1, 3], torch.tensor(0.5))  # half a key's column further


def test_crossvit_tells_its_branches_apart():
    model = timm.create_model("crossvit_micro")
    small, large = TokenGroup("small_patch", (8, 16)), TokenGroup("large_patch", (4, 8))
    layout = model.attention_layouts((32, 64))["stages.2.fusion.large.attn"]
    assert layout == AttentionLayout((TokenGroup("large_cls"),), (TokenGroup("large_cls"), small))
    assert model.token_layout((32, 64)) == (TokenGroup("small_cls"), small, TokenGroup("large_cls"), large)


def test_cmt_pools_its_keys_until_the_last_stage():
    layouts = timm.create_model("cmt_micro").attention_layouts((32, 64))
    first, last = layouts["stages.0.blocks.1.attn"], layouts["stages.2.blocks.4.attn"]
    assert first == AttentionLayout((TokenGroup("patch", (16, 32)),), (TokenGroup("pooled", (4, 8)),))
    assert last == AttentionLayout.among((TokenGroup("patch", (4, 8)),))


def test_crossvits_features_know_the_branchs_own_scale():
    points = timm.create_model("crossvit_9_224").feature_points()
    assert [point.reduction for point in points[2:4]] == [12, Fraction(120, 7)]  # 240 pixels on 14 patches
    assert [point.output for point in points] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "arguments", "remedy"),
    [
        ("crossvit_micro", {"patch_sizes": (4, 10)}, r"patch_size=10 .* try one of 4, 8, 12, 16"),
        ("deepvit_micro", {"patch_size": 5}, r"patch_size=5 is odd.* try 6"),
    ],
)
def test_a_patch_that_the_conv_stem_cannot_reach_is_refused(name, arguments, remedy):
    with pytest.raises(InputError, match=remedy):
        timm.create_model(name, **arguments)


def test_the_cost_of_cross_attention_is_linear_in_the_tokens():
    def cost(tokens):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            ClsCrossAttention(24, 3)(torch.empty(1, tokens, 24))
        return counter.get_total_flops()

    assert cost(400) - cost(200) == 2 * (cost(200) - cost(100)) > 0


def test_cross_attention_is_the_first_row_of_self_attention():
    cross, full = ClsCrossAttention(24, 3), SelfAttention(24, 3)
    projections = (cross.q, cross.k, cross.v)
    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat([projection.weight for projection in projections]))
        full.qkv.bias.copy_(torch.cat([projection.bias for projection in projections]))
    full.proj.load_state_dict(cross.proj.state_dict())
    tokens = torch.randn(2, 9, 24)
    torch.testing.assert_close(cross(tokens), full(tokens)[:, :1])


def test_each_further_cross_attention_attends_to_the_same_patches_by_what_the_one_before_made():
    own, other = Branch(6, 2, 4.0), Branch(4, 2, 4.0)
    way = CrossAttentionWay(own, other, Rates(), 0.0, depth=3).eval()
    tokens, others = torch.randn(2, 3, 6), torch.randn(2, 5, 4)
    cls = way.project(tokens[:, :1])
    for part in (way, *way.further):
        rows = part.norm(torch.cat([cls, others[:, 1:]], dim=1))
        cls = cls + part.attn(rows)
    expected = torch.cat([way.project_back(cls), tokens[:, 1:]], dim=1)
    torch.testing.assert_close(way(tokens, others), expected)


def test_without_an_exchange_the_logits_are_the_mean_of_two_transformers():
    model = create_model("crossvit_micro", fusion="none").eval()
    images = torch.randn(2, 3, 32, 32)
    logits = []
    for name in ("small", "large"):
        tokens, _ = getattr(model, f"embed_{name}")(images)
        for stage in model.stages:
            tokens = getattr(stage, name)(tokens)
        logits.append(getattr(model.head, name)(getattr(model, f"norm_{name}")(tokens)[:, 0]))
    torch.testing.assert_close(model(images), (logits[0] + logits[1]) / 2)


def test_k_encoders_are_k_times_the_blocks():
    model = create_model("crossvit_micro", encoders=5, depths=(2, 1), drop_path_rate=0.1)
    assert [(len(stage.small), len(stage.large)) for stage in model.stages] == 5 * [(2, 1)]
    assert model.stages[-1].fusion.small.drop_path.rate == 0.1


def test_a_temperature_divides_the_logits_of_attention():
    attention = TemperedAttention(6, 2, temperature=0.25)
    tokens = torch.randn(1, 5, 6)
    queries, keys, values = (part.view(1, 5, 2, 3).transpose(1, 2) for part in attention.qkv(tokens).chunk(3, dim=2))
    maps = (queries @ keys.transpose(2, 3) / (0.25 * 3**0.5)).softmax(dim=3)
    expected = attention.proj((maps @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(tokens), expected)


def test_a_fixed_mixing_stays_as_it_began_while_the_rest_learns():
    model = create_model("deepvit_micro", learn_mixing=False, depth=2, mixing_norm="none")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    optimizer.step()
    stayed = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert stayed == {f"blocks.{i}.attn.mixing.matrix.{part}" for i in (0, 1) for part in ("weight", "bias")}


def test_identity_mixing_makes_re_attention_plain_attention():
    mixing = HeadMixing(3)
    with torch.no_grad():
        mixing.matrix.weight.copy_(torch.eye(3)[:, :, None, None])
        mixing.matrix.bias.zero_()
    re_attention, plain = ReAttention(36, 3, mixing), SelfAttention(36, 3)
    plain.load_state_dict({k: v for k, v in re_attention.state_dict().items() if not k.startswith("mixing.")})
    tokens = torch.randn(2, 7, 36)
    torch.testing.assert_close(re_attention(tokens), plain(tokens))


def test_the_folded_mixing_is_convolution_and_batch_norm():
    mixing = BatchNormMixing(5, scale=0.3).double()
    for parameter in (mixing.norm.weight, mixing.norm.bias, mixing.norm.running_mean):
        nn.init.normal_(parameter)
    nn.init.uniform_(mixing.norm.running_var, 0.5, 2.0)
    maps = torch.rand(2, 5, 7, 9, dtype=torch.float64)
    mixing.eval()
    torch.testing.assert_close(mixing(maps), 0.3 * mixing.norm(mixing.matrix(maps)), rtol=1e-12, atol=1e-12)


def test_only_the_last_blocks_re_attend():
    model = DeepViT(img_size=48, dim=36, heads=3, depth=3, re_attention=1)
    assert [type(block.attn) for block in model.blocks] == [SelfAttention, SelfAttention, ReAttention]


@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_a_rescaled_block_adds_twice_what_its_branches_make_of_half_the_stream(branch):
    block = RescaledBlock(2, nn.Identity(), mlp_ratio=1.5)
    block.attn, block.mlp = nn.Threshold(1e9, 0.0), nn.Threshold(1e9, 0.0)  # 0 of everything
    setattr(block, branch, nn.Tanh())
    block.norm1, block.norm2 = nn.Softplus(), nn.Softplus()  # LayerNorm's result would not know half from whole
    tokens = torch.tensor([[[0.0, 2.0]]])
    halves = [math.tanh(math.log(1 + math.exp(x / 2))) for x in (0.0, 2.0)]
    expected = torch.tensor([[[0 + 2 * halves[0], 2 + 2 * halves[1]]]])
    torch.testing.assert_close(block(tokens), expected)


def test_deepvit_s_mixes_by_the_plain_mixing_over_the_root_of_the_head_width():
    with torch.device("meta"):
        model = timm.create_model("deepvit_s")
    assert [type(block.attn) for block in model.blocks] == 11 * [SelfAttention] + 5 * [ReAttention]
    mixing = BatchNormMixing(12, model.blocks[-1].attn.mixing.scale)
    plain = BatchNormMixing(12)
    plain.load_state_dict(mixing.state_dict())
    maps = torch.rand(2, 12, 3, 5).softmax(-1)
    for training in (True, False):
        mixed, expected = mixing.train(training)(maps), plain.train(training)(maps)
        torch.testing.assert_close(mixed, expected / 33**0.5)  # 396 channels, 12 heads


@pytest.mark.parametrize("name", ["deepvit_l", "deepvit_l_384"])
def test_deepvit_l_mixes_plainly_in_its_last_twelve_blocks(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert [type(block.attn) for block in model.blocks] == 20 * [SelfAttention] + 12 * [ReAttention]
    assert [type(block) for block in model.blocks] == 32 * [RescaledBlock]
    assert {block.attn.mixing.scale for block in model.blocks[20:]} == {1.0}


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
STEM_KEYS = {  # of the official code
    "deepvit_s": {
        "patch_embed.conv1.weight": (64, 3, 7, 7),
        "patch_embed.conv2.weight": (64, 64, 3, 3),
        "patch_embed.proj.weight": (396, 64, 8, 8),
        "patch_embed.proj.bias": (396,),
    }
    | {f"patch_embed.bn{i}.{key}": () if key == NORM[-1] else (64,) for i in (1, 2) for key in NORM},
    "crossvit_9_dagger_224": {
        "patch_embed.0.proj.0.weight": (32, 3, 7, 7),
        "patch_embed.0.proj.0.bias": (32,),
        "patch_embed.0.proj.2.weight": (64, 32, 3, 3),
        "patch_embed.0.proj.2.bias": (64,),
        "patch_embed.0.proj.4.weight": (128, 64, 3, 3),
        "patch_embed.0.proj.4.bias": (128,),
        "patch_embed.1.proj.0.weight": (64, 3, 7, 7),
        "patch_embed.1.proj.0.bias": (64,),
        "patch_embed.1.proj.2.weight": (128, 64, 3, 3),
        "patch_embed.1.proj.2.bias": (128,),
        "patch_embed.1.proj.4.weight": (256, 128, 3, 3),
        "patch_embed.1.proj.4.bias": (256,),
    },
    "cmt_ti": {f"stem_conv{i}.weight": (16, 3 if i == 1 else 16, 3, 3) for i in (1, 2, 3)}
    | {f"stem_conv{i}.bias": (16,) for i in (1, 2, 3)}
    | {f"stem_norm{i}.{key}": () if key == NORM[-1] else (16,) for i in (1, 2, 3) for key in NORM},
}


@pytest.mark.parametrize("name", STEM_KEYS)
def test_the_stem_has_the_official_keys(name):
    with torch.device("meta"):
        state = to_official(timm.create_model(name))
    stem = {key: tuple(value.shape) for key, value in state.items() if key.startswith(("patch_embed.", "stem_"))}
    assert stem == STEM_KEYS[name]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("deepvit_micro", {"depth": -1}, "depth=-1 cannot be built; give whole numbers, 1 or more"),
        ("deepvit_micro", {"re_attention": 99}, "re_attention=99 is more than all depth=8 blocks; try 8"),
        ("deepvit_micro", {"re_attention": -1}, "re_attention=-1 cannot be built; give whole numbers, 0 or more"),
        ("deepvit_micro", {"patch_size": 0}, "patch_size=0 cannot be built"),
        ("deepvit_micro", {"num_classes": "7"}, "num_classes='7' cannot be built; give whole numbers"),
        ("crossvit_micro", {"heads": (3,)}, r"heads=\(3,\) are not two"),
        ("crossvit_micro", {"depths": (1,)}, r"depths=\(1,\) are not two"),
        ("crossvit_micro", {"depths": (0, 0)}, r"depths=\(0, 0\) cannot be built"),
        ("crossvit_micro", {"heads": 4}, "heads=4 are not two"),
        ("crossvit_micro", {"encoders": 0}, "encoders=0 cannot be built"),
        ("crossvit_micro", {"fusion": "none", "fusion_depth": 2}, "fusion_depth=2 is of cross-attention alone"),
        ("deepvit_micro", {"temperature": 0.5}, "all blocks re-attend; give re_attention=0"),
        ("deepvit_micro", {"temperature": 0, "re_attention": 0}, "temperature=0 is none; give a number above 0"),
        ("cmt_micro", {"positions": "absolute"}, "positions='absolute' is not known"),
        ("cmt_micro", {"norm": "batch"}, "did you mean 'batch_norm'"),
        ("cmt_micro", {"pooling": (0, 2, 1)}, r"pooling=\(0, 2, 1\) cannot be built"),
        ("vit_micro", {"patch_size": 0}, "patch_size=0 cannot be built"),
        ("resnet_micro", {"strides": (0, 2, 2, 2)}, r"strides=\(0, 2, 2, 2\) cannot be built"),
        ("tokenfusion_late_micro", {"fusion_depth": 0}, "fusion_depth=0 cannot be built"),
        *((name, {"in_chans": -3}, "in_chans=-3 cannot be built") for name in list_models("*_micro")),
        *((name, {"num_classes": -1}, "num_classes=-1 cannot be built") for name in list_models("*_micro")),
    ],
)
def test_an_impossible_number_is_refused(name, arguments, message):
    with pytest.raises(InputError, match=message):
        create_model(name, **arguments)


def test_pairwise_fusion_keeps_cls_and_a_constant_map():
    tokens = torch.cat([torch.full((1, 1, 2), 5.0), torch.full((1, 6, 2), 3.0)], dim=1)
    moved = interpolate_patches(tokens, (2, 3), (4, 5))
    assert torch.equal(moved[:, 0], tokens[:, 0])
    torch.testing.assert_close(moved[:, 1:], torch.full((1, 20, 2), 3.0))


def test_lightweight_attention_pools_whole_cells_of_keys():
    attention = LightweightAttention(8, 2, 4)
    pooled = attention.pool(torch.randn(1, 8, 9, 5))
    assert pooled.shape == (1, 8, 3, 2)  # 9×5 padded to 12×8


def test_cmt_without_positions_attends_by_queries_and_pooled_keys_alone():
    torch.manual_seed(0)
    model = create_model("cmt_micro", positions="none")
    assert not [name for name in model.state_dict() if "positions" in name]
    attention, tokens = model.stages[0].blocks[0].attn.eval(), torch.randn(1, 64, 32)
    pooled = attention.pool(tokens.transpose(1, 2).unflatten(2, (8, 8))).flatten(2).transpose(1, 2)
    maps = (attention.q(tokens) @ attention.k(pooled).transpose(1, 2) / 32**0.5).softmax(dim=2)
    expected = attention.proj(maps @ attention.v(pooled))
    torch.testing.assert_close(attention(tokens, (8, 8), None), expected, rtol=1e-4, atol=1e-5)


def test_cmt_unpooled_keeps_its_positions_over_all_keys():
    layouts = create_model("cmt_micro", pooling=(1, 1, 1)).attention_layouts((32, 32))
    assert layouts["stages.0.blocks.0.attn"] == AttentionLayout.among((TokenGroup("patch", (16, 16)),))
    attention = LightweightAttention(4, 2, pooling=1)
    tokens, bias = torch.randn(1, 6, 4), torch.randn(2, 6, 6)
    split = [layer(tokens).view(1, 6, 2, 2).transpose(1, 2) for layer in (attention.q, attention.k, attention.v)]
    maps = (split[0] @ split[1].transpose(2, 3) / 2**0.5 + bias).softmax(dim=3)
    expected = attention.proj((maps @ split[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(tokens, (2, 3), bias), expected)


@pytest.mark.parametrize(("norm", "kind"), [("batch_norm", nn.LayerNorm), ("layer_norm", nn.BatchNorm2d)])
def test_a_cmt_of_one_kind_of_norm_has_none_of_the_other(norm, kind):
    model = create_model("cmt_micro", norm=norm)
    assert not [name for name, part in model.named_modules() if type(part) is kind]
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_batch_norm_over_tokens_centres_each_channel_over_the_batch():
    model = create_model("cmt_micro", norm="batch_norm").train()
    normed = model.stages[0].blocks[0].norm1(3 * torch.randn(4, 9, 32) + 5)
    torch.testing.assert_close(normed.mean(dim=(0, 1)), torch.zeros(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(normed.std(dim=(0, 1), correction=0), torch.ones(32), rtol=0, atol=1e-4)


def test_one_stage_of_cmt_is_a_column_on_one_grid():
    one = {"dims": (24,), "depths": (3,), "heads": (2,), "pooling": (1,), "stem": "patch", "stem_stride": 8}
    model = CMT(img_size=64, stem_dim=6, head_dim=20, **one)
    assert [point.reduction for point in model.feature_points()] == [16]
    assert model.token_layout() == (TokenGroup("patch", (4, 4)),)


def test_irffn_without_its_depthwise_weights_is_two_pointwise_layers():
    ffn = InvertedResidualFeedForward(4, 6).eval()
    with torch.no_grad():
        ffn.conv.weight.zero_()
        ffn.conv.bias.zero_()
    x = torch.randn(1, 4, 3, 5)
    torch.testing.assert_close(ffn(x), ffn.project(ffn.norm(ffn.expand(x))))
