"""What CrossViT, DeepViT and CMT can do beyond the official code, on small models of odd sizes."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenfusion.layers.attend import Attend, SelfAttention
from tokenfusion.layers.positions import PositionTable, RelativePositionTable
from tokenfusion.models.cmt import CMT
from tokenfusion.models.cmt_blocks import InvertedResidualFeedForward, LightweightAttention
from tokenfusion.models.crossvit import CrossViT
from tokenfusion.models.crossvit_fusion import FUSIONS, ClsCrossAttention, regrid
from tokenfusion.models.deepvit import MIXINGS, BatchNormMixing, DeepViT, HeadMixing, ReAttention

CROSSVIT = {"img_size": 48, "dims": (24, 40), "heads": (3, 5), "depths": (1, 2), "num_classes": 7}
DEEPVIT = {"img_size": 48, "dim": 36, "heads": 3, "depth": 3, "num_classes": 7}
CMT_ARGUMENTS = {
    "img_size": 64, "dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1), "stem_dim": 6, "head_dim": 20, "num_classes": 7,
}  # fmt: skip
MODELS = {
    "crossvit": (CrossViT, CROSSVIT),
    "crossvit_dagger": (CrossViT, CROSSVIT | {"stem": "conv"}),
    **{f"crossvit_{fusion}": (CrossViT, CROSSVIT | {"fusion": fusion}) for fusion in FUSIONS},
    "deepvit": (DeepViT, DEEPVIT),
    "deepvit_rescaled": (
        DeepViT,
        DEEPVIT | {"re_attention": 1, "stem": "conv", "block": "rescaled", "mixing_scale": True},
    ),
    **{f"deepvit_{norm}": (DeepViT, DEEPVIT | {"mixing_norm": norm}) for norm in MIXINGS},
    "deepvit_plain": (DeepViT, DEEPVIT | {"re_attention": 0}),
    "cmt": (CMT, CMT_ARGUMENTS),
    "cmt_no_lpu": (CMT, CMT_ARGUMENTS | {"local": "none"}),
    "cmt_plain_attention": (CMT, CMT_ARGUMENTS | {"attention": "plain"}),
    "cmt_plain_ffn": (CMT, CMT_ARGUMENTS | {"feed_forward": "plain"}),
    "cmt_patch_stem": (CMT, CMT_ARGUMENTS | {"stem": "patch"}),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name, **kwargs):
    torch.manual_seed(0)
    model_cls, arguments = MODELS[name]
    return model_cls(**(arguments | kwargs))


def images(height, width, channels=3):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


@every_model
def test_a_step_reaches_every_parameter(name):
    model = build(name).train()
    F.cross_entropy(model(images(64, 64)), torch.tensor([1, 2])).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@every_model
@pytest.mark.parametrize("size", [(37, 61), (80, 33), (1, 5)])
def test_any_size_and_an_image_does_not_see_its_neighbours(name, size):
    model = build(name).eval()
    with torch.no_grad():
        both, alone = model(images(*size)), model(images(*size)[1:])
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[0], both[1])


@every_model
@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels_and_the_last_is_looked_at(name, channels):
    model = build(name, in_chans=channels).eval()
    changed = images(48, 48, channels)
    changed[:, -1] += torch.linspace(0, 3, 48)
    with torch.no_grad():
        assert not torch.allclose(model(images(48, 48, channels)), model(changed))


@every_model
def test_head_and_classifier(name):
    model = build(name).eval()
    with torch.no_grad():
        features = model.forward_features(images(40, 56))
        before = model.forward_head(features, pre_logits=True)
        assert before.shape == (2, model.num_features)
        assert torch.equal(model.get_classifier()(before), model(images(40, 56)))
        model.reset_classifier(11)
        assert model(images(40, 56)).shape == (2, model.num_classes) == (2, 11)
        model.reset_classifier(0)
        assert torch.equal(model(images(40, 56)), before)


@every_model
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_intermediates_have_the_channels_and_reductions_of_feature_info(name, output_fmt):
    model = build(name).eval()
    with torch.no_grad():
        final, features = model.forward_intermediates(images(60, 90), output_fmt=output_fmt)
        expected = model.forward_features(images(60, 90))
        last = model.forward_intermediates(images(60, 90), indices=[-1], intermediates_only=True)[0]
    assert all(map(torch.equal, final, expected))
    for info, feature in zip(model.feature_info, features, strict=True):
        rows, columns = -(-60 // info["reduction"]), -(-90 // info["reduction"])
        if output_fmt == "NLC":
            assert feature.shape == (2, rows * columns, info["num_chs"])
        else:
            assert feature.shape == (2, info["num_chs"], rows, columns)
            assert last.shape == features[-1].shape


@every_model
def test_stopping_early_or_pruning_changes_no_feature(name):
    model = build(name).eval()
    with torch.no_grad():
        full = model.forward_intermediates(images(48, 64), indices=[0, 1], intermediates_only=True)
        early = model.forward_intermediates(images(48, 64), indices=[0, 1], intermediates_only=True, stop_early=True)
        size = sum(p.numel() for p in model.parameters())
        kept = model.prune_intermediate_layers([0, 1], prune_norm=True)
        pruned = model.forward_intermediates(images(48, 64), indices=kept, intermediates_only=True)
    assert sum(p.numel() for p in model.parameters()) < size
    for feature, stopped, cut in zip(full, early, pruned, strict=True):
        assert torch.equal(feature, stopped)
        assert torch.equal(feature, cut)


@pytest.mark.parametrize(
    ("name", "reductions"), [("crossvit_tiny_224", [12, 17]), ("deepvit_16", [16] * 3), ("cmt_ti", [4, 8, 16, 32])]
)
def test_features_only_through_timm(name, reductions):
    model = timm.create_model(name, features_only=True, img_size=48).eval()
    with torch.no_grad():
        features = model(images(64, 96))
    assert model.feature_info.reduction() == reductions
    assert [feature.shape[1] for feature in features] == model.feature_info.channels()
    assert [feature.shape[2:] for feature in features] == [(-(-64 // r), -(-96 // r)) for r in reductions]


@every_model
def test_gradient_checkpointing_changes_nothing_not_even_running_statistics(name):
    results = []
    for enable in (False, True):
        model = build(name, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(images(48, 48)).square().sum().backward()
        results.append({**{k: p.grad for k, p in model.named_parameters()}, **dict(model.named_buffers())})
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(name, training):
    model = build(name).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")(images(40, 72))
    torch.testing.assert_close(compiled, build(name).train(training)(images(40, 72)))


@every_model
def test_exports(name):
    model = build(name).eval()
    program = torch.export.export(model, (images(40, 72),))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images(40, 72)), model(images(40, 72)))


@every_model
def test_bfloat16_autocast_stays_near_float32(name):
    model = build(name).eval()
    with torch.no_grad():
        exact = model(images(48, 48))
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images(48, 48))
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.05 * exact.abs().max().item())


@every_model
def test_no_weight_decay_names_parameters(name):
    model = build(name)
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@every_model
def test_the_explicit_path_equals_the_fused_one(name):
    model = build(name).eval()
    with torch.no_grad():
        fused = model(images(48, 64))
        for module in model.modules():
            if isinstance(module, Attend):
                module.fused_attn = False
        torch.testing.assert_close(model(images(48, 64)), fused, rtol=1e-4, atol=1e-5)


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
    model = DeepViT(**(DEEPVIT | {"re_attention": 1}))
    assert [type(block.attn) for block in model.blocks] == [SelfAttention, SelfAttention, ReAttention]


def test_pairwise_fusion_keeps_cls_and_a_constant_map():
    tokens = torch.cat([torch.full((1, 1, 2), 5.0), torch.full((1, 6, 2), 3.0)], dim=1)
    moved = regrid(tokens, (2, 3), (4, 5))
    assert torch.equal(moved[:, 0], tokens[:, 0])
    torch.testing.assert_close(moved[:, 1:], torch.full((1, 20, 2), 3.0))


def test_lightweight_attention_pools_whole_cells_of_keys():
    attention = LightweightAttention(8, 2, 4)
    pooled = attention.pool(torch.randn(1, 8, 9, 5))
    assert pooled.shape == (1, 8, 3, 2)  # 9×5 padded to 12×8


def test_irffn_without_its_depthwise_weights_is_two_pointwise_layers():
    ffn = InvertedResidualFeedForward(4, 6).eval()
    with torch.no_grad():
        ffn.conv.weight.zero_()
        ffn.conv.bias.zero_()
    x = torch.randn(1, 4, 3, 5)
    torch.testing.assert_close(ffn(x), ffn.project(ffn.norm(ffn.expand(x))))


def test_cmt_features_train_a_detector_one_step():
    from torchvision.models.detection import RetinaNet
    from torchvision.ops import FeaturePyramidNetwork

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timm.create_model("cmt_s", features_only=True, out_indices=(1, 2, 3), img_size=64)
            self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), 16)
            self.out_channels = 16

        def forward(self, x):
            return self.pyramid({str(i): feature for i, feature in enumerate(self.body(x))})

    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    detector = RetinaNet(Backbone(), num_classes=3, anchor_generator=anchors, min_size=96, max_size=96).train()
    boxes = {"boxes": torch.tensor([[10.0, 12.0, 50.0, 60.0]]), "labels": torch.tensor([1])}
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = sum(detector([torch.rand(3, 96, 72, generator=torch.Generator().manual_seed(2))], [boxes]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    stem = detector.backbone.body.model.stem.conv1.weight
    assert stem.grad.abs().max() > 0
    assert losses[1] < losses[0]
