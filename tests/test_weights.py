"""Weights are read, checked, fitted and given back; a model they do not fit stays as it was."""

import argparse
import pickle
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file

from tokenfusion.errors import InputError
from tokenfusion.models.cmt import CMT
from tokenfusion.models.crossvit import CrossViT
from tokenfusion.models.deepvit import DeepViT
from tokenfusion.weights import LoadedWeights, load_weights, to_official

SMALL = {
    "crossvit": (CrossViT, {"img_size": 48, "dims": (24, 40), "heads": (3, 5), "num_classes": 7}),
    "deepvit": (DeepViT, {"img_size": 48, "dim": 36, "heads": 3, "depth": 2, "num_classes": 7}),
    "cmt": (
        CMT,
        {"img_size": 64, "dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "stem_dim": 6, "num_classes": 7},
    ),
}
every_paper = pytest.mark.parametrize("name", SMALL)


def build(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    model_cls, arguments = SMALL[name]
    model = model_cls(**(arguments | kwargs)).eval()
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return model


def images(height=48, width=48):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def refused(model, source, match):
    """Loading is refused, with this message, and the model stays as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=match):
        load_weights(model, source)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@every_paper
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=1)}])
def test_official_files_there_and_back(name, wrap, tmp_path):
    model, other = build(name), build(name, seed=1)
    torch.save(wrap(to_official(model)), tmp_path / "official.pth")
    assert load_weights(other, tmp_path / "official.pth") == LoadedWeights()
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))
    official = to_official(model)
    assert to_official(other).keys() == official.keys()
    assert official.keys().isdisjoint(key for key in model.state_dict() if key.startswith(("stages.", "embed")))


@every_paper
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_own_files(name, prefix, tmp_path):
    model, other = build(name), build(name, seed=1)
    save_file({prefix + key: value for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    load_weights(other, str(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))


def test_timms_crossvit_file():
    twin = timm.create_model("crossvit_tiny_240", num_classes=5)
    model = timm.create_model("crossvit_tiny_224", num_classes=5)
    load_weights(model, {"state_dict": twin.state_dict()})
    official = to_official(model)
    for key, value in twin.state_dict().items():
        spelled = key.replace("pos_embed_", "pos_embed.").replace("cls_token_", "cls_token.")
        assert torch.equal(official[spelled], value), key


def test_timm_loads_official_files_itself(tmp_path):
    model = timm.create_model("crossvit_tiny_224", num_classes=5)
    torch.save(to_official(model), tmp_path / "official.pth")
    overlay = {"file": str(tmp_path / "official.pth"), "num_classes": 5}
    other = timm.create_model("crossvit_tiny_224", pretrained=True, pretrained_cfg_overlay=overlay, img_size=(96, 60))
    state = other.state_dict()
    assert torch.equal(state["stages.2.fusion.large.attn.q.weight"], model.stages[2].fusion.large.attn.q.weight)
    assert state["embed_small.positions.table"].shape == (1, 1 + 8 * 5, 96)


@every_paper
def test_position_tables_are_resized_to_another_image_size(name):
    model, larger = build(name), build(name, seed=1, img_size=(128, 96))
    loaded = load_weights(larger, to_official(model))
    assert loaded.left_out == ()
    assert set(loaded.resized) == {key for key in model.state_dict() if key.endswith("positions.table")}
    with torch.no_grad():  # resized once at loading, or at each call: the same
        torch.testing.assert_close(larger(images(128, 96)), model(images(128, 96)), rtol=1e-4, atol=1e-5)


@every_paper
@pytest.mark.parametrize("classes", [0, 4])
def test_a_head_of_another_class_count_is_left_out_and_said_so(name, classes):
    model, other = build(name), build(name, seed=1, num_classes=classes)
    head = {key: value.clone() for key, value in other.head.state_dict().items()}
    with pytest.warns(UserWarning, match=rf"the head was left out .* have 7 classes, the model {classes}"):
        loaded = load_weights(other, to_official(model))
    assert loaded.left_out
    assert all(key.startswith("head.") for key in loaded.left_out)
    with torch.no_grad():
        for mine, theirs in zip(other.forward_features(images()), model.forward_features(images()), strict=True):
            assert torch.equal(mine, theirs)
    for key, value in other.head.state_dict().items():
        assert torch.equal(value, head[key])


def test_nothing_is_said_when_everything_fits():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(build("cmt"), build("cmt", seed=1).state_dict())


@pytest.mark.parametrize(
    ("name", "other", "sentence"),
    [
        ("crossvit", "cmt", "they are a CMT's, the model is a CrossViT"),
        ("cmt", "deepvit", "they are a DeepViT's, the model is a CMT"),
        ("deepvit", "crossvit", "they are a CrossViT's, the model is a DeepViT"),
    ],
)
@pytest.mark.parametrize("official", [False, True])
def test_another_papers_weights(name, other, sentence, official):
    source = build(other)
    refused(build(name), to_official(source) if official else source.state_dict(), sentence)


def test_another_variants_weights_name_the_variant():
    with torch.device("meta"):
        official = to_official(timm.create_model("deepvit_24"))
    refused(timm.create_model("deepvit_16"), official, r"wrong variant: they fit deepvit_24.*blocks\.16\.\S+ is not in")
    with torch.device("meta"):
        official = to_official(timm.create_model("crossvit_9_dagger_224"))
    message = r"they fit crossvit_9_dagger_224; .*embed_small\.patches\.weight is missing; .*; and \d+ more"
    refused(timm.create_model("crossvit_9_224"), official, message)


def test_one_missing_key_is_named():
    state = build("cmt").state_dict()
    del state["stages.1.embed.norm.bias"]
    refused(build("cmt", seed=1), state, r"stages\.1\.embed\.norm\.bias is missing$")


@every_paper
def test_another_number_of_channels(name):
    refused(build(name), to_official(build(name, in_chans=5)), r"create the model with in_chans=5")


def test_a_position_table_that_is_of_no_square_grid():
    refused(build("deepvit"), build("deepvit", img_size=(32, 96)).state_dict(), r"the image size differs")


def test_weights_of_no_known_model():
    refused(build("deepvit"), torch.nn.Linear(3, 2).state_dict(), "of no model known here")


class Code:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is damaged, or not a file of weights"),
        (b"not weights at all", "is damaged, or not a file of weights"),
        (b"PK", "is damaged, or not a file of weights"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "is damaged, or not a file of weights"),
        (b'{"model": {"w": [1.0]}}', "is damaged, or not a file of weights"),
        (pickle.dumps(Code()), "could carry code, and was not opened"),
    ],
)
def test_files_that_are_not_weights(content, match, tmp_path, capsys):
    path = tmp_path / "odd file.pth"
    path.write_bytes(content)
    refused(build("deepvit"), path, match)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [1, 9, 200, 0.5, -1])
def test_truncated_files(suffix, kept, tmp_path):
    model = build("deepvit")
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else kept])
    refused(model, path, "is damaged, or not a file of weights")


@pytest.mark.parametrize(("suffix", "write"), [(".pth", save_file), (".safetensors", torch.save)])
def test_files_of_the_other_format(suffix, write, tmp_path):
    model = build("deepvit")
    write(build("deepvit", seed=1).state_dict(), tmp_path / f"weights{suffix}")
    refused(model, tmp_path / f"weights{suffix}", "is damaged, or not a file of weights")


@pytest.mark.parametrize("convert", [torch.Tensor.int, torch.Tensor.bool, torch.Tensor.cfloat, torch.Tensor.to_sparse])
def test_tensors_that_are_no_plain_numbers(convert, tmp_path):
    torch.save({key: convert(value) for key, value in build("cmt").state_dict().items()}, tmp_path / "odd.pth")
    refused(build("cmt", seed=1), tmp_path / "odd.pth", "no plain real numbers; save the weights as dense float32")


def test_one_tensor_of_the_wrong_type_keeps_the_others_out():
    state = build("crossvit").state_dict()
    state["norm_large.bias"] = state["norm_large.bias"].int()
    refused(build("crossvit", seed=1), state, r"\. norm_large\.bias is of torch\.int32 \(torch\.strided\), the model's")


@every_paper
@pytest.mark.parametrize("convert", [torch.Tensor.cfloat, torch.Tensor.to_sparse, torch.Tensor.int])
def test_odd_position_tables_of_another_image_size_are_not_resized(name, convert):
    state = build(name, img_size=128).state_dict()
    state |= {key: convert(value) for key, value in state.items() if key.endswith(".table")}
    refused(build(name, seed=1), state, "no plain real numbers; save the weights as dense float32")


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e300])
def test_values_that_are_not_finite_are_refused(value):
    state = build("cmt").double().state_dict()
    state["stages.1.embed.norm.bias"][3] = value  # 1e300 is too large for the model's float32
    refused(build("cmt", seed=1), state, r"NaN or infinite.*\. stages\.1\.embed\.norm\.bias has values that are not")


def test_a_head_that_is_a_single_number_is_refused():
    state = build("deepvit").state_dict() | {"head.weight": torch.tensor(1.0)}
    refused(build("deepvit", seed=1), state, r"head\.weight is \(\), the model's \(7, 36\)")


def test_half_precision_files_are_taken():
    state = build("cmt").half().state_dict()
    model = build("cmt", seed=1)
    assert load_weights(model, state) == LoadedWeights()
    assert all(torch.equal(value, state[key].to(value.dtype)) for key, value in model.state_dict().items())


def test_code_inside_a_zip_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"model": {}, "extra": Code()}, tmp_path / "code.pth")
    refused(build("deepvit"), tmp_path / "code.pth", "could carry code, and was not opened")
    assert capsys.readouterr().out == ""


INSIDE_ITSELF = {}
INSIDE_ITSELF["model"] = INSIDE_ITSELF


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "holds no weights but a list"),
        ({}, "no weights"),
        ({"model": {"w": 1}}, "else than tensors, such as 'w'"),
        (INSIDE_ITSELF, "else than tensors, such as 'model'"),
    ],
)
def test_files_without_weights(content, match, tmp_path):
    torch.save(content, tmp_path / "odd.pth")
    refused(build("deepvit"), tmp_path / "odd.pth", match)


def test_no_such_file(tmp_path):
    refused(build("deepvit"), tmp_path / "none.pth", "there is no file")
    refused(build("deepvit"), tmp_path, "there is no file")


@pytest.mark.parametrize("name", ["vit_micro", "resnet_micro", "tokenfusion_early_micro"])
def test_a_model_without_official_weights(name):
    model = timm.create_model(name)
    with pytest.raises(InputError, match="has no official weights; give a model of CrossViT, DeepViT, CMT"):
        to_official(model)
    refused(model, build("deepvit").state_dict(), "has no official weights")
