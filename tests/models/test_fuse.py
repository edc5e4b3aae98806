"""Any CNN with any transformer: what fuses learns and starts as its parents, what cannot be fused is refused."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

import tokenfusion
from tokenfusion.errors import InputError
from tokenfusion.models import fuse as fusing
from tokenfusion.models.adapters import MAX_STAGES, OneWayCNN, as_cnn, split_stages
from tokenfusion.models.backbones import CNNBackbone
from tokenfusion.models.official import with_present_names
from tokenfusion.models.operators import OPERATORS
from tokenfusion.models.token_fusion import STRATEGIES

SIZE, CLASSES = 64, 5
SMALL = {"img_size": SIZE, "patch_size": 16, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": CLASSES}
OURS = {"img_size": SIZE, "num_classes": CLASSES}
NARROW = {"dims": (16, 32), "heads": (2, 2), "depths": (1, 1)}
TRANSFORMERS = {
    "vit": lambda: VisionTransformer(**SMALL, dynamic_img_size=True),
    "siglip": lambda: VisionTransformer(**SMALL, class_token=False, global_pool="avg"),
    "dino": lambda: VisionTransformer(**SMALL, reg_tokens=2),
    "deit": lambda: VisionTransformerDistilled(**SMALL),
    "beit": lambda: Beit(**SMALL, use_rel_pos_bias=True, use_abs_pos_emb=False),
    "eva": lambda: Eva(**SMALL, use_rot_pos_emb=True),
    "deepvit_micro": lambda: tokenfusion.create_model("deepvit_micro", dim=32, heads=2, depth=4, **OURS),
    "crossvit_micro": lambda: tokenfusion.create_model("crossvit_micro", **NARROW, **OURS),
}
BOTH_WAYS = [
    *("resnet18", "regnety_002", "convnext_atto", "efficientnet_b0", "mobilenetv3_small_050", "mobilenetv4_conv_small"),
    *("densenet121", "vgg11_bn", "repvit_m0_9", "ghostnet_100", "rexnet_100", "resnet_micro"),
]
ONE_WAY = ["mambaout_femto", "cmt_micro"]
SHALLOW = {  # the same kinds of stages, with fewer blocks in each
    "resnet18": {"layers": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "mobilenetv3_small_050": {"depth_multiplier": 0.2},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "vgg11_bn": {"mlp_ratio": 0.01},
    "repvit_m0_9": {"depth": (1, 1, 1, 1)},
    "rexnet_100": {"depth_mult": 0.2},
    "mambaout_femto": {"depths": (1, 1, 1, 1)},
    "cmt_micro": {"depths": (1, 1, 1)},
}
REFUSED = {  # by the transformer; what CLS asks at the entrance, nobody may
    ("early", "joint"): ("beit", "eva", "crossvit_micro"),
    ("early", "cls"): tuple(TRANSFORMERS),
    ("late", "cls"): ("siglip", "beit", "eva"),
    ("late", "add"): ("vit", "dino", "deit", "deepvit_micro", "crossvit_micro"),
    ("layerwise", "cls"): ("siglip",),
    ("early", "query"): tuple(TRANSFORMERS),
    ("late", "query"): ("siglip", "beit", "eva"),
    ("layerwise", "query"): ("siglip",),
}


def images(count=2, size=(SIZE, SIZE)):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def without_zeros(model):
    """Nothing starts at 0, where it would stop a gradient."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def learns(model):
    """Names of the parameters that a backward pass leaves without a gradient; a bias before a norm has none to have."""
    without_zeros(model).train()
    model(images()).square().sum().backward()
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not (parameter.grad.any() or name.endswith("bias"))
    ]


def learns_from_the_transformer(model, alone):
    """It starts as its transformer alone and, with its gates open, learns everywhere."""
    if not model.joint:  # whose tokens share every attention map from the first block on
        with torch.no_grad():
            torch.testing.assert_close(model(images()), alone(images()), rtol=0, atol=1e-6)
    model.set_gates(1.0)
    assert learns(model) == []


@pytest.fixture
def tried_for_real(monkeypatch):
    """A pair is not tried on the meta device, where that takes longer than for real."""
    monkeypatch.setattr(fusing, "require_size", lambda *_: None)


# every CNN by the strategy that uses all its stages; a walked one, and one that goes one way, by the others too
WHOLE = [(cnn, "vit", "layerwise") for cnn in (*BOTH_WAYS, *ONE_WAY)]
WHOLE += [(cnn, "vit", strategy) for cnn in ("resnet18", "mambaout_femto") for strategy in ("late", "early")]
WHOLE += [("cmt_micro", vit, strategy) for vit in TRANSFORMERS for strategy in STRATEGIES if vit != "vit"]


@pytest.mark.usefixtures("tried_for_real")
@pytest.mark.parametrize(("cnn", "vit", "strategy"), WHOLE)
def test_a_pair_learns_everywhere_and_starts_as_its_transformer(cnn, vit, strategy):
    torch.manual_seed(0)
    operator = "cross" if vit in REFUSED.get((strategy, "joint"), ()) else ""
    transformer = TRANSFORMERS[vit]()
    alone = copy.deepcopy(transformer).eval()
    parent = tokenfusion.create_model(cnn, img_size=SIZE, **SHALLOW.get(cnn, {}))
    model = tokenfusion.fuse(parent, transformer, strategy, operator, img_size=SIZE).eval()
    assert isinstance(model.cnn, OneWayCNN) == (cnn in ONE_WAY)
    learns_from_the_transformer(model, alone)


@torch.no_grad()
@pytest.mark.usefixtures("tried_for_real")
@pytest.mark.parametrize("cnn", [*BOTH_WAYS, *ONE_WAY])
def test_every_pair_fits(cnn, monkeypatch):
    """The CNN's maps are looked for once."""
    seen, find = {}, CNNBackbone.find_grids

    def find_once(own, *size):
        key = type(own), own.dims
        seen[key] = seen.get(key) or find(own, *size)
        return seen[key]

    monkeypatch.setattr(CNNBackbone, "find_grids", find_once)
    parent = tokenfusion.create_model(cnn, img_size=SIZE, **SHALLOW.get(cnn, {})).eval()
    for vit in TRANSFORMERS:
        model = tokenfusion.fuse(copy.deepcopy(parent), TRANSFORMERS[vit](), img_size=SIZE).eval()
        assert model(images()).shape == (2, CLASSES), vit
        assert all(exchange.write is not None for exchange in model.exchanges[:-1]) == (cnn in BOTH_WAYS)


@pytest.mark.usefixtures("tried_for_real")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("vit", TRANSFORMERS)
def test_every_cell_of_the_grid_starts_as_its_transformer_and_learns_or_is_refused_with_the_reason(
    vit, strategy, operator
):
    torch.manual_seed(0)
    transformer = TRANSFORMERS[vit]()
    alone = copy.deepcopy(transformer).eval()

    def build():
        cnn = tokenfusion.create_model("resnet_micro", stem=8, dims=(8, 16, 24))
        return tokenfusion.fuse(cnn, transformer, strategy, operator, img_size=SIZE).eval()

    if vit in REFUSED.get((strategy, operator), ()):
        with pytest.raises(InputError, match=r"does not fit .*: .*; take another operator"):
            build()
    else:
        learns_from_the_transformer(build(), alone)


@pytest.mark.parametrize("name", sorted({*BOTH_WAYS} - {"resnet_micro"}))
def test_a_walked_cnn_gives_the_intermediates_of_the_whole_one(name):
    torch.manual_seed(0)
    model = without_zeros(timm.create_model(name, **SHALLOW.get(name, {}))).eval()
    with torch.no_grad():
        expected = model.forward_intermediates(images(size=(64, 96)), intermediates_only=True)[-4:]
        walked = as_cnn(model, (64, 96), 3, MAX_STAGES)
        feature_map = walked.stem(images(size=(64, 96)))
        for stage, wanted in zip(walked.stages, expected, strict=True):
            feature_map = stage(feature_map)
            torch.testing.assert_close(feature_map, wanted)
        torch.testing.assert_close(walked(images(size=(64, 96))), expected[-1])


def test_a_cnn_that_adds_parameters_of_its_own_between_its_stages_goes_one_way():
    """A walk of its modules would leave them out."""
    torch.manual_seed(0)
    model = without_zeros(timm.create_model("visformer_tiny", img_size=SIZE)).eval()
    with torch.no_grad():
        expected = model.forward_intermediates(images(), intermediates_only=True)
        cnn = as_cnn(model, (SIZE, SIZE), 3, MAX_STAGES)
        assert isinstance(cnn, OneWayCNN)
        for feature_map, wanted in zip(cnn.maps(images()), expected, strict=True):
            torch.testing.assert_close(feature_map, wanted)
        torch.testing.assert_close(cnn(images()), expected[-1])


def test_a_cnn_whose_stages_hand_on_several_tensors_goes_one_way():
    with torch.device("meta"):
        assert isinstance(as_cnn(timm.create_model("selecsls42"), (SIZE, SIZE), 3, MAX_STAGES), OneWayCNN)


def test_images_are_normalised_for_each_parent():
    """resnet18 wants ImageNet's mean and deviation, this ViT wants 0.5 and 0.5."""
    model = tokenfusion.fuse("resnet18", "vit_tiny_patch16_224", "late", img_size=SIZE, num_classes=CLASSES)
    pixels = torch.rand(1, 3, 4, 4)
    mean, std = (torch.tensor(model.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert mean.flatten().tolist() == [0.5] * 3
    imagenet = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(model.cnn.rescale((pixels - mean) / std), (pixels - imagenet[0]) / imagenet[1])


def test_gates_are_open_from_random_weights_and_closed_for_modules():
    by_name = tokenfusion.fuse("resnet_micro", "vit_micro")
    built = tokenfusion.fuse("resnet_micro", tokenfusion.create_model("vit_micro"))
    assert by_name.exchanges[0].gate.weight.unique().tolist() == [1.0]
    assert built.exchanges[0].gate.weight.unique().tolist() == [0.0]


def test_an_expression_is_a_model_name():
    torch.manual_seed(0)
    model = tokenfusion.create_model(
        "fuse(resnet_micro, vit_micro, layerwise, cross)", num_classes=3, img_size=(24, 40)
    )
    torch.manual_seed(0)
    same = tokenfusion.fuse("resnet_micro", "vit_micro", "layerwise", "cross", num_classes=3, img_size=(24, 40))
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in model.state_dict().items())
    assert model(torch.zeros(1, 3, 24, 40)).shape == (1, 3)


def test_sizes_channels_and_classes_of_a_fused_pair():
    model = tokenfusion.fuse("resnet18", "vit_tiny_patch16_224", img_size=(64, 96), in_chans=1, num_classes=7).eval()
    assert model(torch.zeros(2, 1, 64, 96)).shape == (2, 7)
    assert model(torch.zeros(2, 1, 50, 70)).shape == (2, 7)
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model(torch.zeros(1, 1, 64, 96)).shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet81", "vit_micro"), r"no model is called 'resnet81'; did you mean .*resnet18"),
        (("resnet18", "vit_micro", "layerwize"), r"strategy='layerwize' is not known; did you mean 'layerwise'"),
        (("resnet18", "vit_micro", "late", "cros"), r"operator='cros' is not known; did you mean 'cross'"),
        (("resnet18", "mixer_s16_224"), r"a MlpMixer is none of the transformers"),
        (("resnet18", "swin_tiny_patch4_window7_224"), r"a SwinTransformer is none of the transformers"),
        (("inception_v4", "vit_micro"), r"a InceptionV4 gives no maps .* 32×32 pixels: .+; give a larger img_size"),
    ],
)
def test_what_cannot_be_fused_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        tokenfusion.fuse(*arguments)


@pytest.mark.parametrize("mistake", [TypeError, AttributeError, KeyError])
def test_a_mistake_in_a_cnn_is_not_taken_for_a_cnn_that_does_not_fit(mistake):
    cnn = tokenfusion.create_model("resnet18", img_size=SIZE)

    def stumble(*_):
        raise mistake("of the one who wrote it")

    cnn.layer2.register_forward_pre_hook(stumble)
    with pytest.raises(mistake, match="of the one who wrote it"):
        tokenfusion.fuse(cnn, TRANSFORMERS["vit"]())


def test_without_further_arguments_none_is_blamed(monkeypatch):
    def stumble(*_args, **_config):
        raise TypeError("a mistake in the class")

    monkeypatch.setattr(STRATEGIES["late"], "__init__", stumble)
    with pytest.raises(TypeError, match="a mistake in the class"):
        tokenfusion.fuse("resnet_micro", "vit_micro", "late")


def test_efficient_stages_without_a_feature_are_not_walked():
    model = timm.create_model("mobilenetv3_small_050", depth_multiplier=0.2)
    model.feature_info = [{"module": "", "num_chs": 16, "reduction": 2}]
    assert split_stages(model, MAX_STAGES) is None


def test_a_cnn_without_stages_is_refused():
    with pytest.raises(
        InputError, match="a Linear has no stages: it names no feature maps; take a CNN such as resnet18"
    ):
        tokenfusion.fuse(torch.nn.Linear(3, 3), "vit_micro")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tokenfusion.fuse("tokenfusion_late_micro", "vit_micro"), "is fused already; give one of its parents"),
        (lambda: tokenfusion.fuse("resnet_micro", "vit_small_patch16_18x2_224"), "several attentions side by side"),
        (lambda: tokenfusion.fuse("resnet_micro", "vit_micro", nonsense=1), "cannot be built with .*nonsense"),
        (lambda: tokenfusion.fuse("resnet_micro", "vit_micro", "late", mlp_ratio=-1.0), "cannot be built with .*-1"),
        (lambda: tokenfusion.fuse("resnet_micro", "vit_micro", gate=float("nan")), "gate=nan opens nothing; give 0"),
        (lambda: tokenfusion.fuse("vit_micro", "vit_micro"), "a ViT is a transformer, given in the CNN's place; give"),
        (lambda: tokenfusion.fuse("resnet_micro", torch.nn.Linear(3, 3), num_classes=2), "a Linear is none of the"),
        (
            lambda: tokenfusion.fuse(timm.create_model("resnet18"), "vit_micro", in_chans=1),
            r"gives no maps .* for 1-channel images of 32×32 pixels: Invalid channel .*; give .* the in_chans that",
        ),
        (
            lambda: tokenfusion.fuse("resnet_micro", "vit_micro", fusion_depth=2),
            "layerwise fusion cannot be built with",
        ),
        (lambda: tokenfusion.fuse("resnet_micro", "vit_micro", pretrained=True), "has no pretrained weights"),
        (lambda: tokenfusion.fuse("resnet_micro", TRANSFORMERS["deit"](), img_size=96), "cannot take 3-channel images"),
        (lambda: tokenfusion.fuse("resnet_micro", "vit_micro").freeze("both"), "parent='both' is not known"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(build, message):
    with pytest.raises(InputError, match=message):
        build()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_name_is_one_architecture_whatever_the_gate(strategy):
    models = [tokenfusion.fuse("resnet_micro", "vit_micro", strategy, gate=gate) for gate in (0.0, 1.0, None)]
    models.append(tokenfusion.create_model(models[0]._model_args["expression"]))
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in models]
    assert all(other == shapes[0] for other in shapes)


def test_what_a_name_cannot_say_is_kept_beside_it():
    model = tokenfusion.fuse("resnet_micro", "vit_micro", "late", fusion_depth=1)
    same = timm.create_model(model.default_cfg["architecture"], **model._model_args)
    assert same.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("cnn", "vit", "arguments"),
    [
        ("resnet18", "vit", {"strategy": "late", "operator": "add"}),
        ("mambaout_femto", "vit", {"strategy": "early", "operator": "cls"}),
        ("cmt_micro", "eva", {"strategy": "early"}),
        ("cmt_micro", "crossvit_micro", {"strategy": "late", "operator": "add"}),
        ("mambaout_femto", "deit", {"img_size": 96}),
        ("resnet18", "vit", {"in_chans": 1}),
        ("resnet18", "vit", {"nonsense": 1}),
    ],
)
def test_a_refusal_leaves_the_parents_as_they_were(cnn, vit, arguments):
    parents = tokenfusion.create_model(cnn, img_size=SIZE, **SHALLOW.get(cnn, {})), TRANSFORMERS[vit]()
    parts = [list(parent.modules()) for parent in parents]
    before = [copy.deepcopy(parent.state_dict()) for parent in parents]
    with pytest.raises(InputError):
        tokenfusion.fuse(*parents, **{"img_size": SIZE, "num_classes": CLASSES + 2} | arguments)
    for parent, modules, state in zip(parents, parts, before, strict=True):
        assert all(one is other for one, other in zip(parent.modules(), modules, strict=True))
        torch.testing.assert_close(dict(parent.state_dict()), dict(state), rtol=0, atol=0)
        assert parent.training


def test_no_classes_leave_features():
    model = tokenfusion.fuse("resnet_micro", "vit_micro", num_classes=0)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, model.num_features)


def test_new_heads_of_a_probe_stand_where_the_model_does():
    model = tokenfusion.fuse("resnet_micro", "vit_micro", "probe").double().eval()
    features = model.forward_features(images(size=(32, 32)).double())
    model.reset_classifier(3)
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert model.forward_head(features).shape == (2, 3)
    with pytest.raises(InputError, match="num_classes=-1"):
        model.reset_classifier(-1)
    with pytest.raises(InputError, match="global_pool='avg' cannot be chosen"):
        model.reset_classifier(2, "avg")
    assert model.num_classes == 3
    with torch.device("meta"):
        moved = tokenfusion.fuse("resnet_micro", "vit_micro", "probe")
    moved.reset_classifier(3)
    assert {parameter.device.type for parameter in moved.parameters()} == {"meta"}
    model.reset_classifier(0)
    assert torch.equal(model.forward_head(features), features)


def test_a_probe_is_its_equation():
    """The module's docstring, written out for one image by loops and with arithmetic of its own."""
    torch.manual_seed(0)
    model = without_zeros(tokenfusion.fuse("resnet_micro", "vit_micro", "probe", "add", num_classes=CLASSES)).eval()
    for standardize in (model.standardize, model.pixel_source.standardize, model.token_source.standardize):
        standardize.fit([torch.randn(20, len(standardize.mean)) * 3 + 1])
    with torch.no_grad():
        seen = model.observe(images(1, (32, 32)))

        def std(source, values):
            return (values - source.mean) * source.scale

        def mean_cls_mean(pixels, tokens):
            return [pixels.mean(0), tokens[0], tokens[1:].mean(0)]

        z = std(model.standardize, torch.cat(mean_cls_mean(seen.pixels[0], seen.tokens[0])))
        sources = model.pixel_source, model.token_source
        pixels, tokens = (std(source.standardize, part[0]) for source, part in zip(sources, seen, strict=True))
        t = 0.01 * torch.cat([pixels.flatten(), tokens.flatten()])
        p, x = (
            source.norm(source.proj(part)) + source.positions.table[0]
            for source, part in zip(sources, (pixels, tokens), strict=True)
        )
        dp, dx = x[1:], torch.cat([torch.zeros_like(x[:1]), p])  # of one grid here
        u = torch.cat([model.norm(part) for part in mean_cls_mean(p + dp, x + dx)])
        logits = model.head(z) + model.votes(t) + model.read_fused(model.gate.weight * u)
        torch.testing.assert_close(model(images(1, (32, 32)))[0], logits)


def test_registers_are_no_cls():
    transformer = VisionTransformer(**SMALL, class_token=False, reg_tokens=2, global_pool="avg")
    model = tokenfusion.fuse("resnet_micro", transformer, img_size=SIZE)
    assert [group.source for group in model.token_layout()] == ["register", "register", "patch"]


def test_a_size_costs_one_look_at_the_cnn():
    model = tokenfusion.fuse("resnet18", "vit_tiny_patch16_224", "late", img_size=SIZE)
    passes = []
    model.cnn.stages[0].register_forward_hook(lambda *_: passes.append(1))
    expected = {(SIZE, SIZE): (2, 2), (96, 32): (3, 1), (32, 96): (1, 3)}
    for _ in range(3):
        assert {size: model.map_grids(size)[-1] for size in expected} == expected
    assert len(passes) == 2  # it was built for the first size


@pytest.mark.parametrize("cnn", ["resnet18", "mambaout_femto"])
def test_what_was_seen_of_copies_is_not_looked_for_again(cnn, monkeypatch):
    looks, find = [], CNNBackbone.find_grids
    monkeypatch.setattr(CNNBackbone, "find_grids", lambda own, *size: looks.append(type(own)) or find(own, *size))
    parent = tokenfusion.create_model(cnn, img_size=SIZE, **SHALLOW.get(cnn, {}))
    model = tokenfusion.fuse(parent, TRANSFORMERS["vit"](), img_size=SIZE)
    assert looks.count(type(model.cnn)) == 1
    assert model.map_grids((SIZE, SIZE)) == model.cnn.find_grids((SIZE, SIZE), 3)


CONTEXTS = [("resnet_micro", "crossvit_micro"), ("mambaout_femto", "eva"), ("resnet18", "beit"), ("cmt_micro", "vit")]


@pytest.mark.parametrize(("cnn", "vit"), CONTEXTS)
def test_what_blocks_need_besides_tokens_is_of_one_pass_alone(cnn, vit):
    """Threads, checkpointing and compilation, which call a pass's parts at other times, change nothing."""
    torch.manual_seed(0)
    parent = tokenfusion.create_model(cnn, img_size=SIZE, **SHALLOW.get(cnn, {}))
    model = without_zeros(tokenfusion.fuse(parent, TRANSFORMERS[vit](), "layerwise", "cross", img_size=SIZE)).eval()
    batches = [images() + shift for shift in (0, 1, 2, 3)]
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        sum(model(batch).square().sum() for batch in batches[:2]).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(map(torch.equal, *gradients))
    model.set_grad_checkpointing(False)

    def infer(batch):
        with torch.no_grad():
            return model(batch)

    expected = [infer(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(map(torch.allclose, pool.map(infer, batches), expected))
    if cnn == "cmt_micro":  # whose maps are gathered by hooks, see test_a_compiled_pair_says_nothing
        return
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(batches[0])
    torch.testing.assert_close(compiled, expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "present"),
    [
        ("model.vit.head.weight", "model.vit.model.head.weight"),
        ("best.vit.blocks.0.attn.qkv.weight", "best.vit.model.blocks.0.attn.qkv.weight"),
        ("vit.blocks.0.attn.qkv.weight", "vit.blocks.0.attn.qkv.weight"),  # this package's own is no adapter's
        ("ema.readout_gate.weight", "ema.readout.gate.weight"),
        ("exchanges.1.operator.ask_pixels.kv.bias", "exchanges.1.operator.to_pixels.kv.bias"),
        ("operators.0.ask_tokens.q.weight", "operators.0.to_tokens.q.weight"),
        ("optimizer.7.exp_avg", "optimizer.7.exp_avg"),
    ],
)
def test_tensors_of_older_runs_are_found_by_their_present_names(old, present):
    assert with_present_names({old: 1}, {present}) == {present: 1}
    assert with_present_names({"unknown.vit.x": 1}, {present}) == {"unknown.vit.x": 1}


def test_a_compiled_pair_says_nothing(recwarn):
    """Dynamo warned of the thread's number, which it cannot trace."""
    shallow = {"dims": (16,), "depths": (1,), "heads": (1,), "pooling": (2,)}
    cnn, vit = tokenfusion.create_model("cmt_micro", **shallow), tokenfusion.create_model("vit_micro", depth=1)
    model = without_zeros(tokenfusion.fuse(cnn, vit, "layerwise", "cross")).eval()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(torch.zeros(1, 3, 32, 32))
        torch.testing.assert_close(compiled, model(torch.zeros(1, 3, 32, 32)), rtol=1e-4, atol=1e-5)
    assert not [str(warning.message) for warning in recwarn if "get_ident" in str(warning.message)]
