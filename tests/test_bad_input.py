"""Bad models, sizes and weights are refused: the value, the reason, the remedy; nothing is changed by them."""

import json
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tokenfusion import InputError, create_model, list_models

MICRO = list_models("*_micro")


def test_each_near_name_is_offered_once():
    with pytest.raises(InputError, match=r"'crosvit_micro'; did you mean crossvit_micro,") as refused:
        create_model("crosvit_micro")
    offered = str(refused.value).split("did you mean ")[1].rstrip("?").split(", ")
    assert len(offered) == len(set(offered))
    assert all(map(timm.is_model, offered))


@pytest.mark.parametrize("name", MICRO)
def test_a_size_without_pixels_is_refused_and_the_nearest_works(name):
    with pytest.raises(InputError, match=r"img_size=\(-2, 32\) has no pixels; the nearest that works is \(1, 32\)$"):
        create_model(name, img_size=(-2, 32))
    assert create_model(name, img_size=(1, 32)).eval()(torch.zeros(1, 3, 1, 32)).shape == (1, 10)


@pytest.mark.parametrize("size", [(32,), (32, 32, 3), 31.5, "32", (32, None)])
def test_what_is_not_a_size_is_refused(size):
    with pytest.raises(InputError, match=r"is not a size; give a height and a width, or one number for both$"):
        create_model("vit_micro", img_size=size)


@pytest.mark.parametrize(
    ("name", "arguments", "message", "remedied"),
    [
        ("tokenfusion_early_micro", {"heads": 5}, r"heads=5 .* dim=\d+; try heads=4", {"heads": 4}),
        ("crossvit_micro", {"heads": (4, 5)}, r"heads=5 .* dim=128; try heads=4", {"heads": (4, 4)}),
        ("deepvit_micro", {"heads": 7}, r"heads=7 .* dim=64; try heads=4", {"heads": 4}),
        ("cmt_micro", {"heads": (1, 3, 4)}, r"heads=3 .* dim=64; try heads=2", {"heads": (1, 2, 4)}),
        ("vit_micro", {"heads": 0}, r"heads=0 .* dim=96; try heads=1", {"heads": 1}),
    ],
)
def test_heads_that_do_not_divide_the_width_are_refused_and_the_remedy_works(name, arguments, message, remedied):
    with pytest.raises(InputError, match=message):
        create_model(name, **arguments)
    create_model(name, **remedied)


def test_stages_of_unlike_number_are_refused():
    with pytest.raises(InputError, match=r"heads=\(1, 2\).* are not of as many stages"):
        create_model("cmt_micro", heads=(1, 2))


@pytest.mark.parametrize("name", MICRO)
def test_an_unknown_output_format_is_refused(name):
    with pytest.raises(InputError, match=r"output_fmt='NCWH' is not known; did you mean 'NCHW'\?"):
        create_model(name).forward_intermediates(torch.zeros(1, 3, 8, 8), output_fmt="NCWH")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "deepvit_mirco"], "did you mean deepvit_micro"),
        (["--model", "cmt_micro", "--img-size", 0, 32], "has no pixels; the nearest that works is (1, 32)"),
    ],
)
def test_train_says_it_without_a_traceback(command, tmp_path, words, said):
    status, _, errors = command("train", "digits", *words, "--out", tmp_path / "run")
    assert status == 2
    assert said in errors
    assert not (tmp_path / "run" / "model.json").exists()


def integers(path):
    save_file({name: tensor.to(torch.int32) for name, tensor in load_file(path).items()}, path)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "pickled": lambda path: path.write_bytes(pickle.dumps({"weights": [1.0]})),
    "an image": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "integers": integers,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_with_bad_weights_is_refused_by_every_verb(command, run, digit, damage):
    DAMAGES[damage](run / "model.safetensors")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for words in (["predict", run, digit], ["evaluate", run]):
        status, output, errors = command(*words)
        assert status == 2
        assert output == ""
        assert errors.startswith(f"error: {run / 'model.safetensors'} ")
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", ["crossvit_micro", "resnet_micro"])
def test_a_run_with_another_papers_weights_is_refused(command, run, digit, name):
    description = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(description | {"name": name}))
    status, _, errors = command("predict", run, digit)
    assert status == 2
    assert "does not fit this model" in errors
    assert "was it written for another model?" in errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "digits", "--out", "x", "--epochs", "1.9"], "--epochs=1.9 is not a whole number"),
        (["train", "digits", "--out", "x", "--img-size", "8", "8.5"], "--img-size=8.5 is not a whole number"),
        (["predict", "x", "a.png", "--topk", "1.5"], "--topk=1.5 is not a whole number"),
        (["profile", "vit_micro", "--img-size", "8.5", "8"], "--img-size=8.5 is not a whole number"),
    ],
)
def test_a_fraction_is_refused_where_a_whole_number_belongs(command, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    status, _, errors = command(*words)
    assert (status, errors.startswith(f"error: {said}")) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line", ["img_size = 32.5", 'img_size = "32"', 'trivial_augment = "yes"', "epochs = 1.9", "model = 3", 'lr = "0.1"']
)
def test_a_recipe_file_with_a_value_of_another_type_is_refused(command, tmp_path, line):
    (tmp_path / "recipe.toml").write_text(line)
    status, _, errors = command("train", "digits", "--recipe", tmp_path / "recipe.toml", "--out", tmp_path / "run")
    assert status == 2
    assert line.replace(" = ", "=").replace('"', "'") in errors
    assert not (tmp_path / "run").exists()


def ask_onednn():
    raise RuntimeError("could not create a primitive")


@pytest.mark.parametrize("ask", [lambda: torch.empty(2**60), lambda: bytearray(2**62), ask_onednn])
def test_memory_that_does_not_suffice_is_said_without_a_traceback(command, run, digit, monkeypatch, ask):
    def too_much(*_, **__):
        return ask()

    monkeypatch.setattr("tokenfusion.classifier.Classifier.load", too_much)
    status, _, errors = command("predict", run, digit)
    assert status == 2
    assert errors.startswith("error: out of memory (")
    assert "give a smaller --batch-size or --img-size" in errors


def put_weights(weights, run):
    """Other weights for a run, as of a version that knew of no checksums."""
    save_file(weights, run / "model.safetensors")
    description = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(description | {"weights": ""}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(command, run, digit, value):
    weights = load_file(run / "model.safetensors")
    weights["vit.head.bias"][3] = value
    put_weights(weights, run)
    status, output, errors = command("predict", run, digit, "--format", "json")
    assert (status, output) == (2, "")
    assert "head.bias is not finite" in errors


def test_scores_that_are_not_finite_are_no_prediction(command, run, digit):
    weights = load_file(run / "model.safetensors")
    weights["vit.head.weight"].fill_(3e38)
    put_weights(weights, run)
    status, output, _ = command("predict", run, digit, "--format", "json")
    assert status == 1
    assert json.loads(output)["error"] == "the model's scores are not finite"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": 3}, "name=3, which is not of type str"),
        ({"classes": 3}, "classes=3, which is not of type list"),
        ({"classes": [*"012345678", "0"]}, "which are not different names"),
        ({"classes": [*range(10)]}, "which are not different names"),
        ({"preprocess": []}, "preprocess=[], which is not of type dict"),
        ({"preprocess": None}, "preprocess=None, which is not of type dict"),
        ({"precision": "fp8"}, "precision='fp8', which is not one of auto, fp32, bf16"),
        ({"max_pixels": "x"}, "max_pixels='x', which is not of type int"),
        (
            {"preprocess": {"img_size": [8, 8], "in_chans": 1, "mean": [0.5], "std": [0]}},
            "give finite values, and a std",
        ),
        ({"preprocess": {"img_size": [8, 8.5], "in_chans": 1, "mean": [0.5], "std": [1]}}, "give height and width"),
    ],
)
def test_a_description_that_was_tampered_with_is_refused(command, run, digit, changes, said):
    description = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(description | changes))
    status, _, errors = command("predict", run, digit)
    assert status == 2
    assert said in errors


def test_a_misspelled_option_of_predict_is_not_taken_for_a_file(command, run, digit):
    status, _, errors = command("predict", run, digit, "--jsn")
    assert status == 2
    assert "--jsn is no option of predict" in errors


def test_an_unknown_model_is_refused_before_any_image_is_read(command, tmp_path):
    status, output, errors = command("train", "digits", "--model", "vit_micr", "--out", tmp_path / "run")
    assert status == 2
    assert "did you mean" in errors
    assert "reading" not in output


@pytest.mark.parametrize(("size", "reason"), [(["64"], "batch_size=0"), (["64", "64", "3"], "is not a size")])
def test_profile_takes_one_or_two_sides(command, size, reason):
    status, _, errors = command("profile", "resnet_micro", "--img-size", *size, "--batch-size", "0")
    assert status == 2
    assert reason in errors


@pytest.mark.parametrize(
    "words", [["a-0.tar", "a-1.tar", "a-2.tar"], [f"s3://bucket/a-{n}.parquet" for n in range(3)]], ids=["tar", "url"]
)
def test_a_pattern_that_the_shell_has_expanded_is_told(command, tmp_path, words):
    status, _, errors = command("train", *words, "--out", tmp_path / "run")
    assert status == 2
    assert f"error: DATA is one name, but {words[1]} follows; the shell" in " ".join(errors.split())
    status, _, errors = command("train", "photos", "more", "--out", tmp_path / "run")
    assert (status, "Unused Tokens: ['more']" in errors) == (2, True)


@pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--lr"])
def test_what_is_neither_a_number_nor_auto_is_refused(command, tmp_path, option):
    status, _, errors = command("train", "digits", option, "aut", "--out", tmp_path / "run")
    assert (status, errors) == (2, f"error: {option}=aut is no number; give one, or auto\n")
