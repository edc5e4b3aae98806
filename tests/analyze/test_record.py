"""What is recorded is what the model computes, and recording leaves no trace."""

import pytest
import timm
import torch
from torch import nn

from tokenfusion import InputError, create_model, record_attention
from tokenfusion.layers.attend import Attend, attention_map, split_heads
from tokenfusion.layers.tokens import AttentionLayout, TokenGroup
from tokenfusion.models.deepvit import MIXINGS, DeepViT
from tokenfusion.models.parents import ViT

SMALL = {"patch_size": 8, "dim": 12, "depth": 3, "heads": 3, "num_classes": 5}
TIMM = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "beit_base_patch16_224": {"embed_dim": 12, "num_heads": 3, "depth": 3},
    "eva02_tiny_patch14_224": {"patch_size": 16, "embed_dim": 24, "num_heads": 3, "depth": 3},
}


def vit(**changes):
    torch.manual_seed(0)
    return ViT(**SMALL | {"img_size": (24, 40), "mlp_ratio": 2.0} | changes).eval()


def deepvit(**changes):
    torch.manual_seed(0)
    return DeepViT(**SMALL | {"img_size": (24, 40), "re_attention": 1} | changes).eval()


def images(height=24, width=40, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def flags(model):
    return [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]


OURS = ("tokenfusion_late_micro", "tokenfusion_layerwise_micro", "crossvit_micro", "cmt_micro")


@pytest.mark.parametrize("name", OURS)
def test_every_layout_gets_its_map_at_any_size(name):
    model = create_model(name).eval()
    pixels = images(48, 32)
    with torch.no_grad():
        expected = model(pixels)
        with record_attention(model) as maps:
            output = model(pixels)
    assert list(maps) == list(model.attention_layouts())
    for name, layout in model.attention_layouts((48, 32)).items():
        rows, columns = (sum(group.count for group in tokens) for tokens in layout)
        assert maps[name].layout == layout
        assert maps[name].map.shape[2:] == (rows, columns)
        assert maps[name].map.sum(3).allclose(torch.tensor(1.0), atol=1e-5)
        assert maps[name].mixed is None
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_the_map_is_the_softmax_of_queries_and_keys():
    model = vit()
    kept = {}
    model.blocks[1].attn.register_forward_hook(lambda _m, inputs, _o: kept.update(tokens=inputs[0]))
    with torch.no_grad(), record_attention(model) as maps:
        model(images())
        queries, keys, _ = (split_heads(part, 3) for part in model.blocks[1].attn.qkv(kept["tokens"]).chunk(3, dim=2))
    torch.testing.assert_close(maps["blocks.1.attn"].map, attention_map(queries, keys))
    patches = TokenGroup("patch", (3, 5))
    assert maps["blocks.1.attn"].layout == AttentionLayout.among((TokenGroup("cls"), patches))


@pytest.mark.parametrize("norm", MIXINGS)
def test_re_attention_has_a_map_before_and_one_after_the_mixing(norm):
    model = deepvit(mixing_norm=norm)
    with torch.no_grad(), record_attention(model) as maps:
        model(images())
    plain, last = maps["blocks.1.attn"], maps["blocks.2.attn"]
    assert plain.mixed is None
    assert plain.applied is plain.map
    torch.testing.assert_close(last.mixed, model.blocks[2].attn.mixing(last.map))
    assert last.applied is last.mixed


def test_identity_mixing_leaves_the_map():
    model = deepvit(mixing_norm="none")
    with torch.no_grad():
        model.blocks[2].attn.mixing.matrix.weight.copy_(torch.eye(3)[:, :, None, None])
        model.blocks[2].attn.mixing.matrix.bias.zero_()
        with record_attention(model) as maps:
            model(images())
    torch.testing.assert_close(maps["blocks.2.attn"].mixed, maps["blocks.2.attn"].map)


@pytest.mark.parametrize("name", TIMM)
def test_timm_transformers(name):
    model = timm.create_model(name, img_size=(32, 48), num_classes=5, **TIMM[name]).eval()
    before, pixels = flags(model), images(32, 48)
    with torch.no_grad():
        expected = model(pixels)
        with record_attention(model) as maps:
            torch.testing.assert_close(model(pixels), expected, rtol=1e-5, atol=1e-5)
    assert list(maps) == [f"blocks.{i}.attn" for i in range(len(model.blocks))]
    (tokens, _), attention = maps["blocks.0.attn"].layout, maps["blocks.0.attn"].map
    assert tokens[-1] == TokenGroup("patch", (2, 3))
    assert [group.source for group in tokens[:-1]] == ["cls", "dist"][: model.num_prefix_tokens]
    assert attention.shape[2:] == (model.num_prefix_tokens + 6,) * 2
    assert flags(model) == before


def test_registers_are_told_from_patches():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, reg_tokens=3, num_classes=2).eval()
    with torch.no_grad(), record_attention(model) as maps:
        model(images(32, 32))
    sources = [group.source for group in maps["blocks.0.attn"].layout.keys]
    assert sources == ["cls", "register", "register", "register", "patch"]


def test_reduce_sees_every_map_once_a_pass_and_none_is_kept():
    model = deepvit()
    with torch.no_grad(), record_attention(model) as kept:
        model(images())
    seen = []

    def total(record):
        others = [name for name in records if name != record.name]
        assert all(records[name]._map is None for name in others)  # one module's maps at a time
        seen.append(record.name)
        return record.applied.sum().item()

    with torch.no_grad(), record_attention(model, reduce=total) as records:
        model(images())
        model(images())
    assert seen == 2 * list(records)
    for name, record in records.items():
        assert record.reduced == pytest.approx(2 * [kept[name].applied.sum().item()])
        with pytest.raises(InputError, match="handed to reduce and not kept"):
            _ = record.map


def test_gradients_reach_the_maps():
    model = vit()
    with record_attention(model) as maps:
        logits = model(images())
    (gradient,) = torch.autograd.grad(logits[0, 1], [maps["blocks.0.attn"].map])
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0  # the other image


def test_everything_is_as_before_exceptions_included():
    model = deepvit()
    model.blocks[1].attn.attend.fused_attn = False  # as someone left it
    before = flags(model), [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="expected input"), record_attention(model):
        model(images()[:, :2])  # two channels
    with torch.no_grad(), record_attention(model) as outer:
        with record_attention(model) as inner:
            model(images())
        assert not any(flags(model))  # the outer one goes on
        model(images() + 1)
    assert not outer["blocks.0.attn"].map.equal(inner["blocks.0.attn"].map)
    assert (flags(model), [len(module._forward_hooks) for module in model.modules()]) == before


def test_a_map_that_is_not_finite_is_named():
    model, pixels = vit(), images()
    pixels[0, 0, 0, 0] = torch.nan
    before = flags(model)
    with pytest.raises(InputError, match=r"blocks\.0\.attn has values that are not finite"), record_attention(model):
        model(pixels)
    assert flags(model) == before


@pytest.mark.parametrize("name", ["resnet_micro", "resnet18", "swin_tiny_patch4_window7_224"])
def test_models_without_attention_that_can_be_seen(name):
    with pytest.raises(InputError, match="has no attention that can be seen"), record_attention(create_model(name)):
        pass


def test_an_attention_module_without_an_explicit_path():
    model = timm.create_model("vit_tiny_patch16_224")
    model.blocks[7].attn = nn.MultiheadAttention(192, 3)
    before = flags(model)
    with pytest.raises(InputError, match=r"blocks\.7\.attn, a MultiheadAttention, cannot be seen"):
        record_attention(model).__enter__()
    assert flags(model) == before


def test_a_map_that_never_arrives():
    model = vit()
    with pytest.raises(InputError, match=r"the map of blocks\.0\.attn never arrived"), record_attention(model):
        pass
    with record_attention(model) as maps:
        with pytest.raises(InputError, match="has not been computed yet"):
            _ = maps["blocks.2.attn"].map
        model(images())

    class Around(Attend):
        def forward(self, queries, keys, values, bias=None):
            return attention_map(queries, keys, bias) @ values

    model.blocks[1].attn.attend = Around()
    with pytest.raises(InputError, match=r"the map of blocks\.1\.attn never arrived"), record_attention(model):
        model(images())


def test_compiled_models_are_refused():
    model = vit()
    with pytest.raises(InputError, match=r"before torch\.compile"), record_attention(torch.compile(model)):
        pass
    model.blocks[1].compile()
    with pytest.raises(InputError, match=r"before torch\.compile"), record_attention(model):
        pass


def test_an_attention_pool_at_the_head_is_refused():
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, class_token=False, global_pool="map"
    )
    refused = pytest.raises(InputError, match=r"attn_pool, a AttentionPoolLatent, cannot be seen.*global_pool='token'")
    with refused, record_attention(model):
        pass
    assert all(block.attn.fused_attn == model.attn_pool.fused_attn for block in model.blocks)


def test_class_attention_behind_the_blocks_is_refused():
    model = create_model("vit_micro")
    model.asks = torch.nn.MultiheadAttention(96, 3)
    refused = pytest.raises(InputError, match="the attention of asks, a MultiheadAttention, cannot be seen")
    with refused, record_attention(model):
        pass
