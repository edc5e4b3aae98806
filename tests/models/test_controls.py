"""Facts about the controls: model expressions, widened models, and widths that meet a cost."""

from functools import partial

import pytest
import torch
from torch import nn

from tokenfusion import InputError, create_model
from tokenfusion.models import default_config
from tokenfusion.models.controls import controls_of
from tokenfusion.models.cost import count_costs, count_macs, input_size
from tokenfusion.models.expressions import parse
from tokenfusion.models.parents import ResNet
from tokenfusion.models.presets import VARIANTS
from tokenfusion.models.transformer import ViT
from tokenfusion.models.widths import widen

FAMILIES = (
    "vit_micro", "resnet_micro", "deepvit_micro", "crossvit_micro", "cmt_micro",
    "vit(tokenfusion_late_micro)", "cnn(tokenfusion_late_micro)",
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224",
    "resnet18", "resnet26t", "resnext50_32x4d", "convnext_atto", "regnety_008",
    "efficientnet_b0", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv4_conv_small",
)  # fmt: skip


def meta(name: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **arguments)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_arguments_are_split_at_the_top_alone():
    assert parse(" fuse( wide(cnn(a),1.5) ,vit(b), late)") == ("fuse", ["wide(cnn(a),1.5)", "vit(b)", "late"])
    assert parse("cnn(tokenfusion_late_micro)") == ("cnn", ["tokenfusion_late_micro"])


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("wide(resnet18,2", "do not match"),
        ("wide(resnet18,2))", "do not match"),
        ("wide(resnet18),2)", "do not match"),
        ("wide(resnet18,2)x", "do not match"),
        ("resnet18", "do not match"),
        ("wid(resnet18,2)", "did you mean wide"),
        ("wide(resnet18)", r"1 arguments.*wide\(NAME,FACTOR\)"),
        ("fuse(resnet18,vit_micro,late,add,add)", "5 arguments"),
        ("cnn()", "empty"),
        ("wide(,2)", "empty"),
    ],
)
def test_expressions_that_are_none_are_refused(expression, message):
    with pytest.raises(InputError, match=message):
        parse(expression)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("wide(resnet18,0)", "factor 0 .* no number above 0"),
        ("wide(resnet18,nan)", "factor nan"),
        ("wide(resnet18,two)", "factor two"),
        ("wide(resnet81,2)", "resnet18"),
        ("wide(wide(resnet18,2),2)", "twice"),
        ("wide(swin_tiny_patch4_window7_224,2)", "SwinTransformer is not known.*VisionTransformer"),
        ("wide(tokenfusion_late_micro,2)", "is not known"),
        ("wide(efficientnet_b0_gn,2)", "GroupNormAct is not known"),
        ("wide(mixnet_s,1.37)", "cannot be 1.37 times as wide"),
        ("wide(vit_pwee_patch16_reg1_gap_256,2)", "cannot be 2 times as wide"),
        ("cnn(tokenfusion_late_mikro)", "did you mean tokenfusion_late_micro"),
        ("vit(resnet18)", "no fusion preset"),
        ("with(cmt_micro,local)", "'local' in .* is no option; write OPTION=VALUE"),
        ("with(cmt_micro,=none)", "is no option"),
        ("with(cmt_micro,lokal=none)", "lokal"),
        ("with(cmt_micro,local=nune)", "did you mean 'none'"),
        ("with(cmt_micro,num_classes=3)", "num_classes in .* follows from the data"),
        ("with(vit_tiny_patch16_224,num_heads=5)", "cannot be built"),
    ],
)
def test_models_that_there_are_none_of_are_refused(expression, message):
    with pytest.raises(InputError, match=message):
        create_model(expression)


def test_a_control_has_no_pretrained_weights():
    with pytest.raises(InputError, match=r"wide\(resnet18,2\) has no pretrained weights"):
        create_model("wide(resnet18,2)", pretrained=True)


def test_an_unknown_argument_is_refused():
    with pytest.raises(InputError, match="widht"):
        create_model("cnn(tokenfusion_late_micro)", widht=3)


def test_the_sides_of_a_preset_have_its_configuration():
    name = "tokenfusion_layerwise_micro"
    config = VARIANTS[name][1]
    cnn, vit = create_model(f"cnn({name})", num_classes=7), create_model(f"vit({name})", in_chans=1, drop_path_rate=0.1)
    assert isinstance(cnn, ResNet)
    assert isinstance(vit, ViT)
    assert (cnn.cnn.dims, cnn.cnn.stem.conv.out_channels) == (config["conv_dims"], config["stem"])
    assert (vit.embed_dim, vit.patch_size, len(vit.blocks)) == (config["dim"], config["patch_size"], config["depth"])
    assert (cnn.num_classes, vit.num_classes) == (7, 10)
    shared = ("interpolation", "crop_pct", "architecture")
    assert [default_config(cnn)[key] for key in shared] == [default_config(vit)[key] for key in shared]
    assert (default_config(cnn)["num_classes"], default_config(vit)["input_size"]) == (7, (1, 32, 32))
    assert default_config(cnn)["input_size"] == (3, 32, 32)
    assert vit(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_a_transformer_twice_as_wide_costs_what_it_should():
    name = "vit(tokenfusion_late_micro)"
    config = VARIANTS["tokenfusion_late_micro"][1]
    dim, wide = config["dim"], meta(f"wide({name},2)")
    assert wide.embed_dim == 2 * dim
    assert wide.blocks[0].attn.heads == 2 * config["heads"]
    patches = (32 // config["patch_size"]) ** 2
    tokens = 1 + patches

    def macs(dim: int) -> int:  # patches, then qkv, projection, MLP, map and its product with v, then the head
        layers = 4 * dim**2 + 2 * int(config["mlp_ratio"] * dim) * dim
        embedding = patches * 3 * config["patch_size"] ** 2 * dim
        return int(embedding + config["depth"] * (tokens * layers + 2 * tokens**2 * dim) + 10 * dim)

    assert count_macs(name) == macs(dim)
    assert count_macs(f"wide({name},2)") == macs(2 * dim)


def test_a_cnn_twice_as_wide_costs_four_times_but_for_its_ends():
    """All but the first convolution and the head have both sides doubled."""
    name = "resnet_micro"
    ends = 32 * 32 * 9 * 3 * 16 + 128 * 10
    assert count_macs(f"wide({name},2)") == 4 * (count_macs(name) - ends) + 2 * ends


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_widens_and_once_as_wide_is_the_model_itself(name):
    """Costs grow with the square of the widths, less what the images, the head and attention maps cost."""
    plain = meta(name)
    with torch.device("meta"):
        assert shapes(widen(plain, 1.0, partial(create_model, name))) == shapes(plain)
        macs = count_costs(plain, torch.empty(1, 3, *input_size(plain))).macs
    ratio = count_macs(f"wide({name},1.37)") / macs
    assert 1.37 < ratio < 1.37**2 * 1.1


def test_head_and_group_widths_stay():
    plain, wide = meta("vit_tiny_patch16_224"), meta("wide(vit_tiny_patch16_224,1.67)")
    assert wide.embed_dim // wide.blocks[0].attn.num_heads == plain.embed_dim // plain.blocks[0].attn.num_heads == 64
    plain, wide = meta("regnety_008"), meta("wide(regnety_008,1.5)")
    widths = [[conv.weight.shape[1] for conv in m.modules() if isinstance(conv, nn.Conv2d)] for m in (plain, wide)]
    assert all(16 in each for each in widths)
    stages = [model.get_submodule(f"s{i}") for model in (plain, wide) for i in (1, 2, 3, 4)]
    depths = [len(list(stage.children())) for stage in stages]
    assert depths == [1, 3, 8, 2] * 2  # and so do depths


def test_a_network_widened_in_place_is_initialised_as_a_new_one():
    """Doubling every fan-out halves the variance of a convolution's weights; norms start at mean 0, variance 1."""
    torch.manual_seed(0)
    plain, wide = create_model("mobilenetv3_small_100").eval(), create_model("wide(mobilenetv3_small_100,2)").eval()
    ratio = plain.conv_head.weight.var() / wide.conv_head.weight.var()
    assert ratio.item() == pytest.approx(2, rel=0.02)
    for name, buffer in wide.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(buffer, torch.full_like(buffer, float(name.endswith("var"))))
    wide(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in wide.parameters())
    assert wide.feature_info[-1]["num_chs"] == 2 * plain.feature_info[-1]["num_chs"] == wide.num_features


def test_a_network_widened_in_place_keeps_what_it_reads_and_says():
    wide = meta("wide(efficientnet_b0,1.25)", in_chans=8, num_classes=16)
    assert wide.conv_stem.in_channels == 8
    assert wide.classifier.out_features == 16


@pytest.mark.parametrize("preset", ["tokenfusion_late_micro", "tokenfusion_early_tiny", "tokenfusion_layerwise_small"])
def test_widened_sides_cost_what_the_preset_does(preset):
    task = {"num_classes": 7, "img_size": (40, 56)}
    controls = controls_of(preset, **task)
    assert (controls.cnn, controls.vit) == (f"cnn({preset})", f"vit({preset})")
    assert not controls.missing
    assert not controls.notes
    cost = count_macs(preset, **task)
    for wide in (controls.wide_cnn, controls.wide_vit):
        assert count_macs(wide, **task) == pytest.approx(cost, rel=0.05)


@pytest.mark.parametrize(
    ("cnn", "vit"),
    [("resnet18", "vit_tiny_patch16_224"), ("test_efficientnet", "vit_micro")],
)
def test_widened_parents_cost_what_the_pair_does(cnn, vit):
    task = {"num_classes": 5, "img_size": (64, 64)}
    controls = controls_of(f"fuse({cnn},{vit},late)", **task)
    assert (controls.cnn, controls.vit) == (cnn, vit)
    assert not controls.missing
    cost = count_macs(f"fuse({cnn},{vit},late)", **task)
    for role, wide in (("wide_cnn", controls.wide_cnn), ("wide_vit", controls.wide_vit)):
        gap = abs(count_macs(wide, **task) / cost - 1)
        assert gap < 0.05 or (gap > 0.1) == (role in controls.notes)


def test_a_parent_without_a_known_width_is_said_to_be_missing():
    controls = controls_of("fuse(vgg11,vit_micro,late)", num_classes=5, img_size=(64, 64))
    assert controls.cnn == "vgg11"
    assert controls.wide_cnn == ""
    assert list(controls.missing) == ["wide_cnn"]
    assert "VGG" in controls.missing["wide_cnn"]


def test_a_fusion_that_cannot_be_built_says_why():
    with pytest.raises(InputError, match="no model is called 'resnet81'; did you mean resnet18"):
        controls_of("fuse(resnet81,vit_micro)", num_classes=5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "resnet18 is not a fusion of two parents"),
        ("nobody", "nobody is not a fusion of two parents"),
        ("wide(resnet18,2)", "not a fusion of two parents"),
        ("fuse(resnet18,vit_micro", "do not match"),
    ],
)
def test_what_is_not_fused_has_no_controls(name, reason):
    controls = controls_of(name, num_classes=5)
    assert list(controls.missing) == ["cnn", "vit", "wide_cnn", "wide_vit"]
    assert all(reason in said for said in controls.missing.values())
    assert (controls.cnn, controls.vit, controls.wide_cnn, controls.wide_vit) == ("", "", "", "")


def test_options_of_a_class_can_be_written_in_a_name():
    expression = "with(crossvit_micro, fusion=cls_sum, depths=(2, 1), mlp_ratio=2.5)"
    named = meta(expression, num_classes=7)
    assert shapes(named) == shapes(
        meta("crossvit_micro", num_classes=7, fusion="cls_sum", depths=(2, 1), mlp_ratio=2.5)
    )
    fused = meta("fuse(resnet_micro,with(deepvit_micro,depth=4,mixing_norm=none),late)", img_size=32, num_classes=7)
    assert len(fused.vit.blocks) == 4
    wide = meta("wide(with(cmt_micro,local=none),2)", num_classes=7)
    assert not [name for name in wide.state_dict() if ".local." in name]


def test_a_model_with_options_has_no_weights_to_begin_with():
    with pytest.raises(InputError, match="no pretrained weights"):
        create_model("with(resnet18,drop_rate=0.1)", pretrained=True)
