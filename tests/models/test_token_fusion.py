"""Facts about the three fusion strategies and the four operators."""

import pytest
import torch
from torch import nn

import tokenfusion
from tokenfusion.layers.cross_attention import CrossAttention
from tokenfusion.layers.tokens import TokenGroup
from tokenfusion.models.convnet import ConvTrunk
from tokenfusion.models.cost import CountProducts
from tokenfusion.models.exchange import WriteBack
from tokenfusion.models.operators import AlignedAddition, ClsAttention, Grids, JointAttention, TwoWayAttention, regrid
from tokenfusion.models.token_fusion import STRATEGIES, LayerwiseFusion
from tokenfusion.models.transformer import ViT

VIT = {"patch_size": 4, "dim": 24, "depth": 4, "heads": 3, "mlp_ratio": 2.0, "img_size": 16, "num_classes": 3}


def layerwise(operator=AlignedAddition, **kwargs):
    torch.manual_seed(0)
    cnn = ConvTrunk(3, 8, (1, 2, 2), (12, 20), (1, 1))
    return LayerwiseFusion(cnn, ViT(**VIT), operator, img_size=16, **kwargs).eval()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [(32, 32), (29, 50)])
def test_the_layout_describes_the_tokens_there_are(strategy, size):
    model = tokenfusion.create_model(f"tokenfusion_{strategy}_micro").eval()
    with torch.no_grad():
        tokens = model.forward_features(torch.randn(1, 3, *size))
    layout = model.token_layout(size)
    assert sum(group.count for group in layout) == tokens.shape[1]
    assert [group.source for group in layout] == ["cls", "patch"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_branches_reach_the_logits(strategy):
    torch.manual_seed(0)
    model = tokenfusion.create_model(f"tokenfusion_{strategy}_micro").eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        whole = model(image)
        for branch in (model.cnn.stem.conv, model.vit.embed.patches):
            handle = branch.register_forward_hook(lambda _m, _i, output: torch.zeros_like(output))
            assert not torch.allclose(model(image), whole)
            handle.remove()


@pytest.mark.parametrize("operator", [JointAttention, ClsAttention, TwoWayAttention, AlignedAddition])
def test_closed_gates_leave_the_transformer_alone(operator):
    fused, images = layerwise(operator, gate=0.0), torch.randn(2, 3, 19, 27)
    with torch.no_grad():
        alone = fused.vit(images)
        torch.testing.assert_close(fused(images), alone, rtol=0, atol=1e-6)
        fused.set_gates(1.0)
        assert not torch.allclose(fused(images), alone, atol=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_head_reads_the_mean_pixel_beside_cls(strategy):
    model, images = tokenfusion.create_model(f"tokenfusion_{strategy}_micro").eval(), torch.randn(2, 3, 32, 48)
    seen = []
    model.readout.register_forward_hook(lambda _m, inputs, _o: seen.extend(inputs))
    with torch.no_grad():
        model.readout.gate.weight.fill_(0.25)
        logits = model(images)
        tokens, pixels = seen
        read = tokens + pixels.mean(1, keepdim=True) / 4  # the same is added to every token
        torch.testing.assert_close(logits, model.vit.head(model.vit.norm(read))[:, 0])


def test_closed_gates_leave_the_cnn_alone():
    fused, images = layerwise(gate=0.0), torch.randn(2, 3, 19, 27)
    maps = []
    fused.cnn.stages[-1].register_forward_hook(lambda _m, _i, output: maps.append(output))
    with torch.no_grad():
        fused(images)
        fused.cnn(images)
    assert torch.equal(maps[0], maps[1])


def test_addition_keeps_places():
    """A pixel changes the one patch that it lies in, and a patch the pixels that it covers."""
    grids = Grids(patches=(3, 2), pixels=(6, 4))
    tokens, pixels = torch.randn(1, 1 + 6, 7), torch.randn(1, 24, 7)
    add = AlignedAddition(7, 1, 2.0)
    seen, written = add(tokens, pixels, grids)
    assert not seen[:, 0].any()  # CLS
    changed = pixels.clone()
    changed[0, 5 * 4 + 1] += 4  # row 5, column 1 of 6×4 lies in row 2, column 0 of 3×2: patch 4, token 5
    moved = (add(tokens, changed, grids)[0] - seen)[0]
    assert moved.abs().sum(1).nonzero().flatten().tolist() == [5]
    torch.testing.assert_close(moved[5], torch.ones(7))  # a quarter of the patch
    changed = tokens.clone()
    changed[0, 5] += 1
    moved = (add(changed, pixels, grids)[1] - written)[0].sum(1)
    assert moved.nonzero().flatten().tolist() == [4 * 4, 4 * 4 + 1, 5 * 4, 5 * 4 + 1]


def test_coarser_grids_get_means_and_finer_ones_repetitions():
    tokens = torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1)
    assert regrid(tokens, (2, 2), (1, 2)).flatten().tolist() == [2, 3]
    assert regrid(tokens, (2, 2), (2, 4)).flatten().tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def test_what_is_written_back_keeps_places():
    torch.manual_seed(0)
    write, pixels = WriteBack(7, 5, gate=1.0), torch.randn(1, 6, 7)
    changed = pixels.clone()
    changed[0, 4] += torch.randn(7)
    with torch.no_grad():
        moved = (write(changed, (3, 2), (6, 4)) - write(pixels, (3, 2), (6, 4))).abs().sum(1)[0]
    assert moved.nonzero().tolist() == [[4, 0], [4, 1], [5, 0], [5, 1]]


def test_joint_attention_is_a_transformer_block_over_both_kinds():
    joint = JointAttention(6, 2, 2.0)
    tokens, pixels = torch.randn(2, 5, 6), torch.randn(2, 4, 6)
    both = torch.cat([tokens, pixels], dim=1)
    update = torch.cat(joint(tokens, pixels, Grids((2, 2), (2, 2))), dim=1)
    torch.testing.assert_close(both + update, joint.block(both))


def test_cls_attention_updates_cls_alone():
    tokens, pixels = torch.randn(2, 5, 6), torch.randn(2, 4, 6)
    update, to_pixels = ClsAttention(6, 2, 2.0)(tokens, pixels, Grids((2, 2), (2, 2)))
    assert to_pixels is None
    assert update[:, 0].any()
    assert not update[:, 1:].any()


def test_cls_attends_at_a_cost_linear_in_the_pixels():
    def macs(pixels):
        with torch.device("meta"), CountProducts() as count, torch.no_grad():
            ClsAttention(24, 3, 2.0)(torch.empty(1, 5, 24), torch.empty(1, pixels, 24), Grids((2, 2), (pixels, 1)))
        return count.macs.total()

    assert macs(300) - macs(200) == macs(200) - macs(100)


def test_cross_attention_is_softmax_of_queries_and_foreign_keys():
    attention = CrossAttention(4, 2).double()
    tokens, others = torch.randn(1, 3, 4, dtype=torch.float64), torch.randn(1, 5, 4, dtype=torch.float64)
    q, (k, v) = attention.q(tokens)[0], attention.kv(others)[0].chunk(2, dim=1)
    heads = [((q[:, part] @ k[:, part].T) / 2**0.5).softmax(1) @ v[:, part] for part in (slice(0, 2), slice(2, 4))]
    expected = attention.proj(torch.cat(heads, dim=1))
    torch.testing.assert_close(attention(tokens, others)[0], expected)


def test_blocks_are_spread_over_the_stages():
    assert layerwise().cuts == [0, 2, 4]
    cnn = ConvTrunk(3, 8, (1, 2, 2, 2), (4, 4, 4), (1, 1, 1))
    assert LayerwiseFusion(cnn, ViT(**VIT), AlignedAddition, img_size=16).cuts == [0, 1, 2, 4]


def test_too_few_blocks_for_the_stages_are_refused():
    with pytest.raises(tokenfusion.InputError, match="1 blocks do not spread over 2 stages"):
        LayerwiseFusion(
            ConvTrunk(3, 8, (1, 2, 2), (12, 20), (1, 1)), ViT(**VIT | {"depth": 1}), AlignedAddition, img_size=16
        )


def test_parts_share_out_every_parameter():
    model = layerwise()
    parts = {name: model.part_of(name) for name, _ in model.named_parameters()}
    assert parts["vit.head.weight"] == "head"
    assert parts["vit.blocks.0.attn.qkv.weight"] == "vit"
    assert parts["cnn.stem.conv.weight"] == "cnn"
    assert parts["exchanges.0.gate.weight"] == parts["exchanges.1.source.source"] == "fusion"


def test_a_frozen_cnn_keeps_weights_and_statistics():
    model = layerwise(gate=1.0).freeze("cnn").train()
    before = {name: value.clone() for name, value in model.cnn.state_dict().items()}
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert all(torch.equal(value, before[name]) for name, value in model.cnn.state_dict().items())
    assert all(p.grad is not None for n, p in model.named_parameters() if model.part_of(n) != "cnn")
    assert not any(module.training for module in model.cnn.modules())
    assert model.vit.training


def test_a_frozen_transformer_still_learns_a_head():
    model = layerwise(gate=1.0).freeze("vit")
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"vit.head.weight", "vit.head.bias"} == {name for name in learning if name.startswith("vit.")}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_fuses_is_recomputed_with_checkpointing(strategy):
    model = tokenfusion.fuse("resnet_micro", "vit_micro", strategy, "cross").train()
    model.set_grad_checkpointing()
    passes = dict.fromkeys(model.operator_grids((32, 32)), 0)

    def count(name):
        passes[name] += 1

    for name in passes:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: count(name))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert set(passes.values()) == {2}


def test_freezing_takes_the_place_of_what_was_frozen_before():
    model = layerwise(gate=1.0).train()
    model.vit.embed.positions.table.requires_grad_(False)  # fixed on purpose
    model.freeze("cnn").freeze("vit")
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {model.part_of(name) for name in fixed} == {"vit"}
    assert (model.cnn.training, model.vit.training) == (True, False)
    model.freeze()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["vit.embed.positions.table"]
    assert model.vit.training


def test_pixel_tokens_are_in_the_attention_layouts():
    late = tokenfusion.create_model("tokenfusion_late_micro")
    (_, joint) = list(late.attention_layouts().items())[-1]
    assert joint.queries == (TokenGroup("cls"), TokenGroup("patch", (4, 4)), TokenGroup("pixel", (4, 4)))
    for name in late.attention_layouts():
        assert isinstance(late.get_submodule(name), nn.Module)


def test_unknown_names_get_the_nearest():
    with pytest.raises(tokenfusion.InputError, match="did you mean tokenfusion_early_micro"):
        tokenfusion.create_model("tokenfusion_earli_micro")


def test_unknown_arguments_are_refused():
    with pytest.raises(tokenfusion.InputError, match="widht"):
        tokenfusion.create_model("tokenfusion_early_micro", widht=3)


def test_patterns_choose_names():
    assert tokenfusion.list_models("*early_[mt]*") == ["tokenfusion_early_micro", "tokenfusion_early_tiny"]
