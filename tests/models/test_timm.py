"""timm's contract: what its tools ask of a model, kept by every name of this package and by fused pairs.

docs/timm.md says which of timm's own tests have no counterpart here, and why.
"""

import copy
import logging

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn

import tokenfusion
from tokenfusion.errors import InputError
from tokenfusion.models.cmt import CMT
from tokenfusion.models.parents import ResNet

CLASSES = 7
NAMES = tokenfusion.list_models()
MICRO = [name for name in NAMES if name.endswith("_micro")]
PAIRS = {
    "resnet18 and a ViT": ("fuse(resnet18,vit_tiny_patch16_224,layerwise,cross)", {"img_size": 64}),
    "one way": ("fuse(cmt_micro,crossvit_micro,late)", {}),
    "wide": ("wide(resnet_micro,0.5)", {}),
    "a preset's CNN": ("cnn(tokenfusion_late_micro)", {}),
}
micro = pytest.mark.parametrize("name", MICRO)
every = pytest.mark.parametrize("name", NAMES)
pairs = pytest.mark.parametrize(("name", "arguments"), PAIRS.values(), ids=PAIRS)


def images(size, channels=3, count=2):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))


def build(name, **arguments):
    torch.manual_seed(0)
    return tokenfusion.create_model(name, **arguments).eval()


def as_names(value):
    return {value} if isinstance(value, str) else set(value)


def layers_that_differ(one, other, axis=slice(None)):
    """Modules whose own parameters are of another size in a second model, along an axis."""
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (one, other)]
    none = torch.Size()
    return {key.rpartition(".")[0] for key in shapes[0] if shapes[0][key][axis] != shapes[1].get(key, none)[axis]}


@every
def test_the_config_names_what_depends_on_channels_and_on_classes_and_nothing_is_said(name, caplog):
    """timm logs a warning where a model's config is missing."""
    with caplog.at_level(logging.WARNING, logger="timm"), torch.device("meta"):
        model, other = timm.create_model(name), timm.create_model(name, in_chans=1, num_classes=CLASSES)
    assert not caplog.records
    config, theirs = model.pretrained_cfg, other.pretrained_cfg
    outputs, inputs = slice(0, 1), slice(1, None)  # of a weight's axes
    assert as_names(config["first_conv"]) == layers_that_differ(model, other, inputs)
    assert as_names(config["classifier"]) == layers_that_differ(model, other, outputs)
    assert (model.num_classes, other.num_classes) == (config["num_classes"], theirs["num_classes"])
    assert theirs["input_size"] == (1, *config["input_size"][1:])
    assert len(theirs["mean"]) == len(theirs["std"]) == 1
    pool_size = None
    if name in MICRO or isinstance(model, CMT | ResNet):  # meta is slow; of a class all or none give a map
        with torch.device("meta"):
            features = model.eval().forward_features(torch.empty(2, *config["input_size"]))
        if isinstance(features, torch.Tensor) and features.ndim == 4:
            pool_size = tuple(features.shape[2:])
        assert (pool_size is not None) == isinstance(model, CMT | ResNet)
    assert config.get("pool_size") == pool_size


@micro
def test_weights_in_a_file_fit_other_classes_and_channels(name, tmp_path):
    model = build(name)
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    torch.manual_seed(1)
    other = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=CLASSES, in_chans=1
    ).eval()
    first, head = as_names(model.pretrained_cfg["first_conv"]), as_names(model.pretrained_cfg["classifier"])
    theirs = other.state_dict()
    for key, value in model.state_dict().items():
        layer = key.rpartition(".")[0]
        if layer not in head:
            summed = value.sum(1, keepdim=True) if layer in first and key.endswith("weight") else value
            torch.testing.assert_close(theirs[key], summed)
    assert other(images((32, 32), 1)).shape == (2, CLASSES)


def saved(model, folder):
    save_for_hf(model, folder, safe_serialization=True)
    return f"local-dir:{folder}"


@micro
def test_a_saved_folder_is_a_model_of_timms(name, tmp_path):
    model = build(name, num_classes=CLASSES, in_chans=1)
    other = timm.create_model(saved(model, tmp_path), pretrained=True).eval()
    assert other.num_classes == CLASSES
    with torch.no_grad():
        assert torch.equal(other(images((32, 32), 1)), model(images((32, 32), 1)))
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2, in_chans=3).num_classes == 2


@pairs
def test_a_saved_expression_is_a_model_of_timms(name, arguments, tmp_path):
    model = build(name, num_classes=CLASSES, **arguments)
    size = model.pretrained_cfg["input_size"][1:]
    other = timm.create_model(saved(model, tmp_path), pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(other(images(size)), model(images(size)))
    adapted = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2, in_chans=1).eval()
    assert adapted(images(size, 1)).shape == (2, 2)
    assert layers_that_differ(model, adapted) == as_names(model.pretrained_cfg["first_conv"]) | as_names(
        model.pretrained_cfg["classifier"]
    )


def test_a_pair_of_modules_is_saved_and_says_why_it_is_not_built_again(tmp_path):
    model = tokenfusion.fuse(build("resnet_micro"), build("vit_micro"))
    with pytest.raises(InputError, match="expression='' builds nothing"):
        timm.create_model(saved(model, tmp_path), pretrained=True)


def test_a_pair_says_how_its_transformer_wants_its_images():
    pair = tokenfusion.fuse("resnet18", "vit_tiny_patch16_224", img_size=64, in_chans=3)
    ours, wanted = resolve_model_data_config(pair), resolve_model_data_config(timm.create_model("vit_tiny_patch16_224"))
    assert ours == wanted | {"input_size": (3, 64, 64)}
    assert wanted["mean"] != (0.485, 0.456, 0.406)


DEEP = ["cmt_s", "deepvit_32", "crossvit_18_224", "tokenfusion_layerwise_base"]


@pytest.mark.parametrize("name", [*MICRO, *DEEP, *(name for name, _ in PAIRS.values() if name.startswith("fuse"))])
def test_rates_fall_from_the_head_to_the_images_and_not_to_nothing(name):
    with torch.device("meta"):
        model = tokenfusion.create_model(name, **({"img_size": 64} if "224" in name and "(" in name else {}))
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.75)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    assert min(scales.values()) >= 0.75**12
    full = {key for key, scale in scales.items() if scale == 1}
    heads = {key for key in scales if key.rpartition(".")[0] in as_names(model.pretrained_cfg["classifier"])}
    fusion = {key for key in scales if getattr(model, "part_of", str)(key) == "fusion"}
    assert heads | fusion <= full
    for first in as_names(model.pretrained_cfg["first_conv"]):
        side = first.partition(".")[0] if fusion else ""
        assert scales[f"{first}.weight"] == min(scale for key, scale in scales.items() if key.startswith(side))
        assert scales[f"{first}.weight"] < 0.75


@pytest.mark.parametrize("name", ["vit_micro", "cmt_micro", "tokenfusion_layerwise_micro"])
def test_layers_follow_the_model_in_order(name):
    model = build(name)
    seen = []
    for key, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            own = next(module.named_parameters(recurse=False))[0]
            module.register_forward_hook(lambda *_, key=f"{key}.{own}": seen.append(key))
    model(images((32, 32)))
    for part in {key.partition(".")[0] for key in seen} if name.startswith("tokenfusion") else {""}:
        behind = [model.layers_behind(key) for key in seen if key.startswith(part)]
        assert behind == sorted(behind, reverse=True)


@micro
def test_another_input_size_moves_positions_and_leaves_logits(name):
    model = build(name)
    expected = model(images((48, 24)))
    model.set_input_size((48, 24))
    torch.testing.assert_close(model(images((48, 24))), expected)
    assert resolve_model_data_config(model)["input_size"] == (3, 48, 24)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in timm.create_model(name, img_size=(48, 24)).state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


def test_a_pair_moves_its_transformer_too_or_stays_as_it_was(tmp_path):
    model = build("fuse(resnet18,vit_tiny_patch16_224,late)", img_size=64, num_classes=CLASSES)
    model.set_input_size(96)
    assert model.vit.model.pos_embed.shape[1] == 1 + 6 * 6
    assert timm.create_model(saved(model, tmp_path), pretrained=True).img_size == (96, 96)
    model = tokenfusion.fuse("inception_v4", "vit_micro", img_size=96)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="pixels"):
        model.set_input_size(8)
    assert model.img_size == (96, 96)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@micro
def test_without_pooling_the_features_come_out(name):
    model = build(name)
    features = model.forward_features(images((32, 32)))
    model.reset_classifier(0, "")
    built = timm.create_model(name, num_classes=0, global_pool="").eval()
    built.load_state_dict(model.state_dict())
    for same in (model, built):
        unpooled = same(images((32, 32)))
        assert all(map(torch.equal, unpooled, features)) if isinstance(features, tuple) else unpooled.equal(features)
    model.reset_classifier(CLASSES)
    assert model(images((32, 32))).shape == (2, CLASSES)
    with pytest.raises(InputError, match="num_classes=0"):
        model.reset_classifier(CLASSES, "")


@micro
def test_no_images_give_no_logits(name):
    model = build(name, num_classes=CLASSES)
    for training in (False, True):
        if not (training and any(isinstance(module, nn.BatchNorm2d) for module in model.modules())):
            assert model.train(training)(images((32, 32), count=0)).shape == (0, CLASSES)


def test_no_images_give_no_logits_of_a_pair():
    model = build("fuse(resnet18,crossvit_micro,layerwise)", num_classes=CLASSES)
    assert model(images((32, 32), count=0)).shape == (0, CLASSES)


def test_nothing_is_said_while_a_pair_is_built(caplog):
    with caplog.at_level(logging.WARNING, logger="timm"), torch.device("meta"):
        for name, arguments in PAIRS.values():
            tokenfusion.create_model(name, **arguments)
    assert not caplog.records
