"""What every model of this package can do, whatever its paper.

Every registered name is built and run on the meta device: shapes, names, layouts. The micro variants, the papers'
alternatives, being small, and an official model a family keep the whole contract.
"""

from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from torch.overrides import TorchFunctionMode

import tokenfusion
from tokenfusion.layers.attend import Attend, SelfAttention
from tokenfusion.layers.tokens import grid_of
from tokenfusion.models.cmt import CMT
from tokenfusion.models.cmt_blocks import LightweightAttention
from tokenfusion.models.cost import count_macs
from tokenfusion.models.crossvit import CrossViT
from tokenfusion.models.crossvit_fusion import FUSIONS
from tokenfusion.models.deepvit import MIXINGS, BatchNormMixing, DeepViT

CLASSES = 7
CROSSVIT = {"img_size": 48, "dims": (24, 40), "heads": (3, 5), "depths": (1, 2)}
DEEPVIT = {"img_size": 48, "dim": 36, "heads": 3, "depth": 3}
CMT_ARGUMENTS = {"img_size": 64, "dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1), "stem_dim": 6, "head_dim": 20}


def probe(**task):
    """The fusion that starts from a linear classifier, which has no preset, with its gate open."""
    return tokenfusion.fuse("wide(resnet_micro,0.2)", "wide(vit_micro,0.2)", "probe", gate=1.0, **task)


ALTERNATIVES = {  # what the papers compare, as small models of odd widths
    **{f"crossvit-{fusion}": (CrossViT, CROSSVIT | {"fusion": fusion}) for fusion in FUSIONS},
    "crossvit-dagger": (CrossViT, CROSSVIT | {"stem": "conv"}),
    "crossvit-repeated": (CrossViT, CROSSVIT | {"encoders": 4, "fusion_depth": 3}),
    **{f"deepvit-{norm}": (DeepViT, DEEPVIT | {"mixing_norm": norm}) for norm in MIXINGS},
    "deepvit-plain": (DeepViT, DEEPVIT | {"re_attention": 0}),
    "deepvit-tempered": (DeepViT, DEEPVIT | {"re_attention": 1, "temperature": 0.5}),
    "deepvit-rescaled": (
        DeepViT,
        DEEPVIT | {"re_attention": 1, "stem": "conv", "block": "rescaled", "mixing_scale": True},
    ),
    "cmt-published": (CMT, CMT_ARGUMENTS),
    "cmt-no-lpu": (CMT, CMT_ARGUMENTS | {"local": "none"}),
    "cmt-plain-attention": (CMT, CMT_ARGUMENTS | {"attention": "plain"}),
    "cmt-plain-ffn": (CMT, CMT_ARGUMENTS | {"feed_forward": "plain"}),
    "cmt-patch-stem": (CMT, CMT_ARGUMENTS | {"stem": "patch"}),
    "cmt-no-positions": (CMT, CMT_ARGUMENTS | {"positions": "none"}),
    "cmt-batch-norm": (CMT, CMT_ARGUMENTS | {"norm": "batch_norm"}),
    "cmt-layer-norm": (CMT, CMT_ARGUMENTS | {"norm": "layer_norm"}),
    "fused-probe": (probe, {"img_size": 48}),
}
NAMES = tokenfusion.list_models()
MICRO = [name for name in NAMES if name.endswith("_micro")]
SMALL = [*MICRO, *ALTERNATIVES]
OFFICIAL = ["crossvit_9_dagger_224", "deepvit_s", "cmt_ti", "tokenfusion_layerwise_tiny"]
# at a size that is not the model's own; each family at its own is in tests/test_export_families.py
EXPORTED = (
    "tokenfusion_layerwise_micro",
    "crossvit-pairwise",
    "deepvit-layer_norm",
    "cmt-plain-attention",
    "cmt-plain-ffn",
)
SHALLOW = {
    "crossvit_micro": {"depths": (1, 1)},
    "deepvit_micro": {"depth": 2},
    "cmt_micro": {"depths": (1, 1, 1)},
    "vit_micro": {"depth": 2},
}
SHALLOW_CLASSES = {
    CrossViT: {"encoders": 1, "depths": (1, 1)},
    DeepViT: {"depth": 2},
    CMT: {"dims": (8,), "depths": (1,), "heads": (1,), "pooling": (2,)},
    probe: {},
}
small = pytest.mark.parametrize("name", SMALL)
micro = pytest.mark.parametrize("name", MICRO)


def build(name, **kwargs):
    torch.manual_seed(0)
    if name in ALTERNATIVES:
        model_cls, arguments = ALTERNATIVES[name]
        return model_cls(**({"num_classes": CLASSES} | arguments | kwargs))
    return tokenfusion.create_model(name, **({"num_classes": CLASSES} | kwargs))


def shallow(name):
    """A model of fewer blocks, where every block is traced alike, and takes its time."""
    return build(name, **(SHALLOW_CLASSES[ALTERNATIVES[name][0]] if name in ALTERNATIVES else SHALLOW.get(name, {})))


@pytest.fixture(scope="module", params=[*SMALL, *OFFICIAL])
def made(request):
    """A model's name, and its image size where that is not its own."""
    return request.param, {} if request.param in SMALL else {"img_size": 48}


@pytest.fixture(scope="module")
def model(made):
    """A model, built once; a test leaves its weights and its head as they are."""
    name, size = made
    return build(name, **size).eval()


def twin(made, state, channels=3):
    """The same model with these weights, without making weights of its own; other channels see by the first's."""
    name, size = made
    with torch.device("meta"):
        other = build(name, **size, in_chans=channels)
    shapes = {key: value.shape for key, value in other.state_dict().items()}
    by_first = {key: state[key][:, :1].repeat(1, channels, 1, 1) for key in state if state[key].shape != shapes[key]}
    other.load_state_dict(state | by_first, assign=True)
    return other.eval()


def images(height, width, channels=3):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(37, 61), (80, 33), (1, 5)])
def test_any_size_and_an_image_does_not_see_its_neighbours(model, size):
    with torch.no_grad():
        both, alone = model(images(*size)), model(images(*size)[1:])
    assert both.shape == (2, CLASSES)
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(both[0], both[1])


def test_logits_are_the_head_on_the_features(model):
    with torch.no_grad():
        features, logits = model.forward_features(images(40, 56)), model(images(40, 56))
        before = model.forward_head(features, pre_logits=True)
        assert before.shape == (2, model.num_features) == (2, model.head_hidden_size)
        assert torch.equal(model.forward_head(features), logits)
        heads = model.get_classifier()
        if isinstance(heads, tuple):  # each reads a part
            parts = before.split([head.in_features for head in heads], dim=1)
            torch.testing.assert_close(sum(head(part) for head, part in zip(heads, parts, strict=True)), logits)
        else:
            assert torch.equal(heads(before), logits)


def test_intermediates_are_what_feature_info_says(model):
    with torch.no_grad():
        final, features = model.forward_intermediates(images(35, 120))
        assert all(map(torch.equal, final, model.forward_features(images(35, 120))))
    for info, point, feature in zip(model.feature_info, model.feature_points(), features, strict=True):
        assert feature.shape == (2, info["num_chs"], *grid_of((35, 120), point.reduction))
        assert abs(info["reduction"] - point.reduction) <= 0.5


def test_the_norm_and_the_prefix_tokens_of_the_last_intermediate_are_the_final_ones(model):
    chosen = {"indices": [-1], "return_prefix_tokens": True, "output_fmt": "NLC"}
    point = model.feature_points()[-1]
    with torch.no_grad():
        final, ((rows, prefix),) = model.forward_intermediates(images(40, 56), norm=True, **chosen)
        (feature,) = model.forward_intermediates(images(40, 56), indices=[-1], intermediates_only=True)
    if point.prefix_tokens is None:  # a map, which no final norm is for
        assert prefix.shape == (2, 0, point.num_chs)
        assert torch.equal(rows, feature.flatten(2).transpose(1, 2))
    elif not is_vector(final):
        tokens = final if point.output is None else final[point.output]
        assert torch.equal(torch.cat([prefix, rows], dim=1), tokens[:, : prefix.shape[1] + rows.shape[1]])
        assert feature.shape[2] * feature.shape[3] == rows.shape[1]


def is_vector(features):
    """Whether the head reads no tokens but what was made of them."""
    return isinstance(features, torch.Tensor) and features.ndim == 2


def token_count(features):
    """Tokens of what `forward_features` gives: (B, N, C), a map (B, C, h, w), or several of them."""
    if isinstance(features, tuple):
        return sum(map(token_count, features))
    return features.shape[1] if features.ndim == 3 else features.shape[2] * features.shape[3]


@pytest.mark.parametrize("size", [(37, 61), (70, 26)])
def test_layouts_count_the_tokens_there_are(model, size):
    maps, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, Attend):
            module.fused_attn = False  # the map then passes attn_drop
        if name.endswith("attn_drop"):
            observe = lambda _m, inputs, _o, name=name: maps.update({name: inputs[0].shape[-2:]})  # noqa: E731
            handles.append(module.register_forward_hook(observe))
    with torch.no_grad():
        features = model.forward_features(images(*size))
    for handle in handles:
        handle.remove()
    for module in model.modules():
        if isinstance(module, Attend):
            module.fused_attn = True
    assert is_vector(features) or sum(group.count for group in model.token_layout(size)) == token_count(features)
    layouts = model.attention_layouts(size)
    assert len(maps) == len(layouts)
    for name, (queries, keys) in layouts.items():
        (shape,) = [shape for key, shape in maps.items() if key.startswith(f"{name}.")]
        assert shape == (sum(group.count for group in queries), sum(group.count for group in keys)), name


def test_a_step_reaches_every_parameter(model):
    model.train()
    F.cross_entropy(model(images(48, 48)), torch.tensor([1, 2])).backward()
    missed = {key for key, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    normed = {f"{name}.matrix.bias" for name, module in model.named_modules() if isinstance(module, BatchNormMixing)}
    reached = {key for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    unread = {"vit.norm.weight", "vit.norm.bias"} if is_vector(model.forward_features(images(48, 48))) else set()
    assert missed == normed | unread  # BatchNorm takes out the bias before it: its gradient is 0
    assert normed <= reached


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_ours_and_gives_what_it_says(name):
    assert timm.model_entrypoint(name).__module__.startswith("tokenfusion.")
    with torch.device("meta"):
        model = build(name, in_chans=5).eval()
        features, maps = model.forward_intermediates(torch.empty(2, 5, 37, 61))  # one pass: meta is slow
    assert model.forward_head(features).shape == (2, CLASSES)
    assert sum(group.count for group in model.token_layout((37, 61))) == token_count(features)
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    assert all(isinstance(model.get_submodule(part), nn.Module) for part in model.attention_layouts())
    for info, point, feature in zip(model.feature_info, model.feature_points(), maps, strict=True):
        assert feature.shape == (2, info["num_chs"], *grid_of((37, 61), point.reduction))


@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels_and_the_last_is_looked_at(made, model, channels):
    other = twin(made, model.state_dict(), channels)
    changed = images(48, 48, channels)
    changed[:, -1] += torch.linspace(0, 3, 48)
    with torch.no_grad():
        assert not torch.allclose(other(images(48, 48, channels)), other(changed))


def test_reset_classifier_changes_the_head_alone(made, model):
    model = twin(made, model.state_dict())
    with torch.no_grad():
        before = model.forward_head(model.forward_features(images(40, 56)), pre_logits=True)
        model.reset_classifier(11)
        assert model(images(40, 56)).shape == (2, model.num_classes) == (2, 11)
        model.reset_classifier(0)
        assert torch.equal(model(images(40, 56)), before)


@small
def test_stopping_early_or_pruning_changes_no_feature(name):
    model = build(name).eval()
    ran = []
    model.get_submodule(model.feature_points()[-1].module).register_forward_hook(lambda *_: ran.append(name))
    chosen = {"indices": [0, 1], "intermediates_only": True}
    with torch.no_grad():
        early = model.forward_intermediates(images(48, 64), stop_early=True, **chosen)
        assert ran == []
        full = model.forward_intermediates(images(48, 64), **chosen)
        size = sum(p.numel() for p in model.parameters())
        model.prune_intermediate_layers([0, 1], prune_norm=True)
        pruned = model.forward_intermediates(images(48, 64), **chosen)
    assert sum(p.numel() for p in model.parameters()) < size
    for feature, stopped, cut in zip(full, early, pruned, strict=True):
        assert torch.equal(feature, stopped)
        assert torch.equal(feature, cut)


@micro
def test_features_only_through_timm(name):
    model = timm.create_model(name, features_only=True).eval()
    with torch.no_grad():
        features = model(images(37, 61))
    assert [feature.shape[1] for feature in features] == model.feature_info.channels()
    assert [feature.shape[2:] for feature in features] == [grid_of((37, 61), r) for r in model.feature_info.reduction()]


@small
def test_gradient_checkpointing_attends_again_in_the_backward_pass(name):
    model = build(name).train()
    model.set_grad_checkpointing()
    calls = Counter()
    for part in model.attention_layouts() or ["cnn.stages.0"]:
        model.get_submodule(part).register_forward_pre_hook(lambda *_, part=part: calls.update([part]))
    loss = model(images(48, 48)).square().sum()
    assert set(calls.values()) == {1}
    loss.backward()
    assert set(calls.values()) == {2}


@small
@pytest.mark.parametrize("what", ["logits", "features"])
def test_gradient_checkpointing_changes_nothing_not_even_running_statistics(name, what):
    results = []
    for enable in (False, True):
        model = build(name, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        if what == "logits":
            outputs = [model(images(48, 48))]
        else:
            outputs = model.forward_intermediates(images(48, 48), [0, 1], stop_early=True, intermediates_only=True)
        for output in outputs:  # one graph, twice backward
            output.square().sum().backward(retain_graph=True)
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        results.append(gradients | dict(model.named_buffers()))
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_compiles_without_a_graph_break(name):
    model = shallow(name).eval()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(images(40, 72))  # a size is looked at once, outside the graph
        compiled = torch.compile(model, fullgraph=True, backend="eager")(images(40, 72))
        torch.testing.assert_close(compiled, expected)


@micro
def test_compiles_for_training_to_the_same_gradient(name):
    model, other = (shallow(name).train() for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(images(32, 32)).square().sum().backward()
    other(images(32, 32)).square().sum().backward()
    for (key, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_for_any_batch(name):
    model = shallow(name).eval()
    program = torch.export.export(model, (images(40, 72),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    three = torch.cat([images(40, 72), images(40, 72)[:1]])
    with torch.no_grad():
        torch.testing.assert_close(program.module()(three), model(three))


@small
def test_bfloat16_autocast_stays_near_float32(name):
    model = build(name).eval()
    with torch.no_grad():
        exact = model(images(48, 48))
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images(48, 48))
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.05 * exact.abs().max().item())


class FusedCalls(TorchFunctionMode):
    """Counts calls of the fused kernel."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@small
def test_plain_attention_goes_through_the_fused_kernel(name):
    model = build(name).eval()
    plain = sum(isinstance(module, SelfAttention | LightweightAttention) for module in model.modules())
    with torch.no_grad(), FusedCalls() as fused:
        model(images(48, 48))
    assert fused.count >= plain
    assert plain or name.startswith(("resnet", "deepvit"))


@small
def test_the_explicit_path_equals_the_fused_one(name):
    model = build(name).eval()
    with torch.no_grad():
        fused = model(images(48, 64))
        for module in model.modules():
            if isinstance(module, Attend):
                module.fused_attn = False
        torch.testing.assert_close(model(images(48, 64)), fused, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_weights_give_the_same_bits(made, model):
    other = twin(made, load(save(model.state_dict())))
    with torch.no_grad():
        assert torch.equal(other(images(48, 48)), model(images(48, 48)))


@micro
def test_micro_models_cost_the_same(name):
    assert 0.9 * 38e6 <= count_macs(name) <= 40e6


BUDGETS = {"tiny": 1.6e9, "small": 5.5e9, "base": 18e9}  # multiply-adds at 224×224


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("tokenfusion_") and name not in MICRO])
def test_fusion_costs_at_most_its_budget_and_most_of_it(name):
    budget = BUDGETS[name.rsplit("_", 1)[1]]
    assert 0.8 * budget <= count_macs(name) <= budget
