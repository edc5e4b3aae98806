"""The command as a user meets it: its verbs, its precedence, and what it says of bad input."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from children import begin_command
from quiet import no_warning
from runs import TINY
from tokenfusion.cli import app
from tokenfusion.data.open import open_dataset
from tokenfusion.recipe import Recipe, load_recipe
from tokenfusion.training import prepare

QUICK = ("--img-size", 8, "--epochs", 1, "--batch-size", 256)


def test_help_of_the_command_and_of_every_verb(command):
    status, output, _ = command("--help")
    assert status == 0
    verbs = [name for name in app if not name.startswith("-")]
    assert len(verbs) == 14
    for words in (*([verb] for verb in verbs), ["analyze", "collapse"], ["analyze", "tokens"]):
        assert words[0] in output
        status, help_text, _ = command(*words, "--help")
        assert status == 0
        assert help_text.startswith(f"Usage: tokenfusion {' '.join(words)} ")
        assert f"Example: tokenfusion {' '.join(words)} " in help_text
        assert "Try it:" not in help_text
    assert "Try it: tokenfusion train digits" in output
    shown = command("train", "--help")[1].splitlines()
    assert any("train photos/ --pretrained hub --out" in line for line in shown[:8])
    assert command("--version")[1].strip().count(".") == 2


def test_every_field_of_the_recipe_is_an_option_with_help(command):
    from dataclasses import fields

    _, output, _ = command("train", "--help")
    for field in fields(Recipe):
        assert f"--{field.name.replace('_', '-')}" in output


def test_help_names_the_defaults_that_say_something(command):
    _, output, _ = command("check", "--help")
    assert "[default: 224]" in output
    _, output, _ = command("train", "--help")
    shown = set(re.findall(r"\[default: [^]]*\]", " ".join(output.replace("│", "").split())))
    assert {"[default: 0]", "[default: 0.002]", "[default: muon]"} <= shown
    assert not {"[default: ()]", '[default: ""]', "[default: False]", "[default: None]"} & shown


def test_help_imports_neither_torch_nor_timm():
    code = "import sys; sys.argv = ['tokenfusion', '--help']\nfrom tokenfusion import cli\ncli.main()"
    check = (
        f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


def test_an_option_beats_the_file_and_the_file_the_preset(command, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(f'data = "digits"\nmodel = "{TINY}"\nimg_size = [8, 8]\nepochs = 1\nlr = 0.004\nema = 0.5\n')
    status, _, errors = command(
        "train", "--recipe", file, "--lr", 0.003, "--batch-size", 512, "--out", tmp_path / "run"
    )
    assert status == 0, errors
    written = load_recipe(tmp_path / "run" / "recipe.toml")
    assert written["lr"] == 0.003  # option
    assert (written["ema"], written["epochs"]) == (0.5, 1)  # file
    assert written["hflip"] == 0.0  # preset of the digits
    assert written["weight_decay"] == Recipe().weight_decay  # nobody said


def test_the_whole_job(command, tmp_path, digit):
    run = tmp_path / "a run"
    status, output, _ = command("train", "digits", "--model", TINY.replace("early", "late"), *QUICK, "--out", run)
    assert status == 0
    assert "epoch 1/1" in output
    assert f"tokenfusion evaluate '{run}'" in output
    status, output, _ = command("evaluate", run, "--json")
    assert status == 0
    assert json.loads(output) == json.loads((run / "evaluation.json").read_text())
    status, output, _ = command("predict", run, digit)
    assert status == 0
    assert "a digit.png" in output
    status, output, _ = command("report", run)
    assert status == 0
    page = (run / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "Top-5" in page  # of ten classes


def test_evaluation_is_of_the_held_out_images(command, run):
    status, output, _ = command("evaluate", run)
    assert status == 0
    result = json.loads((run / "evaluation.json").read_text())
    with (run / "split.csv").open(newline="") as file:
        held_out = [row for row in csv.DictReader(file) if row["split"] == "val"]
    assert result["n"] == len(held_out)
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [row["path"] for row in held_out]
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert result["top1"] == pytest.approx(right / len(rows))
    assert f"{result['top1']:.2%}" in output
    curve = result["risk_coverage"]
    half = next(risk for share, risk in zip(curve["coverage"], curve["risk"], strict=True) if share >= 0.5)
    assert f"if only the surest half were answered, {half:.2%} would be wrong" in output
    assert "evaluation.json, with risk_coverage.svg; next" in output
    assert (run / "risk_coverage.svg").read_text().startswith("<svg")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["top1"] == pytest.approx(last["val_top1"])  # the shipped weights are those that training judged


WRONG_PATHS = [
    (("evaluate", "runs/x"), "runs/x: no such folder"),
    (("evaluate", "{run}", "phtos"), "phtos: no such file or folder"),
    (("predict", "runs/x", "a.png"), "runs/x: no such folder"),
    (("explain", "runs/x"), "runs/x: no such folder"),
    (("similar", "runs/x", "a.png"), "runs/x: no such folder"),
    (("export", "runs/x", "--out", "y"), "runs/x: no such folder"),
    (("report", "runs/x"), "runs/x: no such folder"),
    (("push", "runs/x", "a/b"), "runs/x: no such folder"),
    (("analyze", "tokens", "runs/x"), "runs/x: no such folder"),
    (("check", "phtos"), "phtos: no such file or folder"),
    (("compare", "phtos", "--models", "vit_micro", "--out", "y"), "phtos: no such file or folder"),
    (("train", "phtos", "--out", "y"), "phtos: no such file or folder"),
    (("train", "digits", "--pretrained", "x.pth", "--out", "y"), "--pretrained {here}/x.pth: no such file"),
    (("train", "digits", "--pretrained", "--out", "y"), "--pretrained has no value behind it; give hub to fetch"),
    (("train", "digits", "--out", "{run}"), "holds a run already; go on with"),
    (("train", "--resume", "runs/x"), "is not a run (it has no recipe.toml)"),
    *(
        ((*words, "{run}", *options), "{run} is a run folder, which `train` wrote; ")
        for *words, options in [
            ("train", ("--out", "y")),
            ("compare", ("--models", "vit_micro", "--out", "y")),
            ("check", ()),
            ("evaluate", "{run}", ()),
            ("analyze", "tokens", "vit_micro", ()),
            ("predict", "{run}", ("a.png",)),
            ("explain", "{run}", ()),
            ("similar", "{run}", ()),
        ]
    ),
    (("predict", "{run}", "nosuch/"), "nosuch/: no such file or folder; this folder has: 'here'"),
    (("explain", "{run}", "a.png", "b/*.png"), "a.png, and 1 more: no such file or folder"),
    (("similar", "{run}", "her"), "her: no such file or folder; did you mean here?"),
]
WITHOUT_TORCH = """
import contextlib, io, json, sys
from tokenfusion import cli
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "timm", "pyarrow", "sklearn"): raise SystemError(name)
sys.meta_path.insert(0, Refuse())
answers = []
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try: cli.main()
        except BaseException as end: answers.append([repr(end), said.getvalue()])
        else: answers.append(["", said.getvalue()])
json.dump(answers, sys.stdout)
"""


def test_a_path_that_cannot_be_right_is_refused_before_torch_is_imported(trained, tmp_path):
    words = json.dumps([[word.format(run=trained) for word in words] for words, _ in WRONG_PATHS])
    process = [sys.executable, "-c", WITHOUT_TORCH, words]
    (tmp_path / "here").mkdir()
    done = subprocess.run(process, cwd=tmp_path, capture_output=True, text=True, check=True)
    for (words, expected), (end, said) in zip(WRONG_PATHS, json.loads(done.stdout), strict=True):
        assert end == "SystemExit(2)", words
        assert expected.format(here=tmp_path, run=trained) in said, words
    assert list(tmp_path.iterdir()) == [tmp_path / "here"]


@pytest.mark.parametrize("data", ["digits", "cifar10", "imagenette-160"])
def test_no_warning_of_a_library_reaches_the_user(command, tmp_path, request, data):
    """Whether training has more loader processes than cores, or the quick model of check has few images."""
    if data != "digits":
        source = open_dataset(request.getfixturevalue("shared") / "data" / data)
        for label, name in enumerate(source.classes[:3]):
            (tmp_path / "data" / name).mkdir(parents=True)
            for index in np.flatnonzero(source.labels == label)[:12]:
                F.to_pil_image(source.decode(index, 10**8)).save(tmp_path / "data" / name / f"{index}.png")
        data = tmp_path / "data"
    workers = ("--workers", (os.cpu_count() or 1) + 1)
    commands = [
        ("check", data, "--out", tmp_path / "check"),
        ("train", data, "--model", "wide(resnet_micro,0.1)", *QUICK, *workers, "--out", tmp_path / "run"),
    ]
    with no_warning():
        for words in commands:
            status, output, errors = command(*words)
            assert (status, "Warning" in output + errors) == (0, False), errors


def test_data_with_only_a_train_part_is_judged_on_what_was_held_out_of_it(command, tmp_path):
    for name in "ab":
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(tmp_path / "data" / "train" / name / f"{i}.png")
    run = tmp_path / "run"
    assert command("train", tmp_path / "data", "--model", "tokenfusion_early_micro", *QUICK, "--out", run)[0] == 0
    for words in ([], [tmp_path / "data"]):
        assert command("evaluate", run, *words)[0] == 0
        result = json.loads((run / "evaluation.json").read_text())
        assert (result["n"], result["split"]) == (4, "val")


def test_evaluation_on_the_training_part(command, run):
    assert command("evaluate", run, "--split", "train")[0] == 0
    assert json.loads((run / "evaluations" / "digits-train" / "evaluation.json").read_text())["n"] == 1438
    assert not (run / "evaluation.json").exists()


def test_evaluation_counts_unreadable_images_and_replaces_none(command, run, tmp_path):
    for name in ("3", "8"):
        (tmp_path / "new" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(tmp_path / "new" / name / f"{i}.png")
    (tmp_path / "new" / "8" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "new" / "3" / "0.png").write_bytes(b"")
    status, output, _ = command("evaluate", run, tmp_path / "new")
    result = json.loads((run / "evaluations" / "new" / "evaluation.json").read_text())
    assert status == 0
    assert (result["n"], result["skipped"]) == (4, 2)
    assert {image["path"] for image in result["unreadable"]} == {"8/1.png", "3/0.png"}
    assert (result["per_class"]["3"]["n"], result["per_class"]["8"]["n"], result["per_class"]["5"]["n"]) == (2, 2, 0)
    assert "skipped 8/1.png" in output


def test_the_report_says_which_images_its_figures_are_of(command, run, tmp_path, digit, monkeypatch):
    (tmp_path / "new" / "3").mkdir(parents=True)
    shutil.copy(digit, tmp_path / "new" / "3" / "1.png")
    monkeypatch.chdir(tmp_path)
    others = f"all images of {tmp_path / 'new'}, which is other data than it was trained on"
    for words, said in (
        ([], "judged on 359 images: the held-out images of digits."),
        (["--split", "train"], "the training images of digits, the very images it was trained on<"),
        (["new"], f"{others}<"),
        (["new", "--out", run], f"judged on 1 image: {others}."),
    ):
        assert command("evaluate", run, *words)[0] == 0
        assert command("report", run)[0] == 0
        assert said in (run / "report.html").read_text().replace("<wbr>", "")
    assert json.loads((run / "evaluation.json").read_text())["data"] == str(tmp_path / "new")


def test_figures_on_other_images_leave_those_on_the_held_out_ones_alone(command, run, tmp_path, digit):
    assert command("evaluate", run)[0] == 0
    own = {name: (run / name).read_bytes() for name in ("evaluation.json", "predictions.csv", "risk_coverage.svg")}
    for place in ("a", "b"):
        (tmp_path / place / "new" / "3").mkdir(parents=True)
        shutil.copy(digit, tmp_path / place / "new" / "3" / "1.png")
        status, output, _ = command("evaluate", run, tmp_path / place / "new")
        assert status == 0
        assert "evaluation.json is as it was, of the run's own held-out images" in output
    assert command("evaluate", run, tmp_path / "a" / "new")[0] == 0  # again, to the same place
    assert {name: (run / name).read_bytes() for name in own} == own
    written = {path.parent.name: json.loads(path.read_text()) for path in run.glob("evaluations/*/evaluation.json")}
    assert {name: found["data"] for name, found in written.items()} == {
        "new": str(tmp_path / "a" / "new"),
        "new-2": str(tmp_path / "b" / "new"),
    }


def test_evaluation_on_images_of_one_class(command, run, tmp_path, digit):
    (tmp_path / "new" / "3").mkdir(parents=True)
    shutil.copy(digit, tmp_path / "new" / "3" / "1.png")
    status, output, _ = command("evaluate", run, tmp_path / "new", "--json")
    assert status == 0
    assert json.loads(output)["per_class"]["3"]["n"] == 1


def test_evaluation_refuses_classes_that_the_model_does_not_know(command, run, tmp_path, digit):
    for name in ("3", "cat"):
        (tmp_path / "new" / name).mkdir(parents=True)
        shutil.copy(digit, tmp_path / "new" / name / "1.png")
    status, _, errors = command("evaluate", run, tmp_path / "new")
    assert status == 2
    assert "'cat'" in errors
    assert "it knows 0, 1" in errors


def test_predict_json_gives_an_object_per_image(command, run, digit, tmp_path):
    status, output, errors = command("predict", run, digit, tmp_path / "no such.png", "--topk", 3, "--format", "json")
    assert status == 1
    good, bad = map(json.loads, output.splitlines())
    assert good.keys() == {"path", "label", "score", "topk"}
    assert good["path"] == str(digit)
    assert len(good["topk"]) == 3
    assert good["topk"][0] == {"label": good["label"], "score": good["score"]}
    assert bad.keys() == {"path", "error"}
    assert "No such file" in bad["error"]
    assert "1 of the images could not be read" in errors


def test_predict_takes_folders_globs_and_standard_input(command, run, tmp_path, digit):
    folder = tmp_path / "some images"
    (folder / "below").mkdir(parents=True)
    names = [folder / "1 ä.png", folder / "below" / "2.png", folder / "line\nbreak.png"]
    for name in names:
        shutil.copy(digit, name)
    (folder / "notes.txt").write_text("no image")

    def paths(*words, **kwargs):
        status, output, _ = command("predict", run, *words, "--format", "json", **kwargs)
        assert status == 0
        return {json.loads(line)["path"] for line in output.splitlines()}

    assert paths(folder) == set(map(str, names))
    assert paths(folder / "*.png") == {str(names[0]), str(names[2])}
    assert paths("-", stdin=f"{digit}\n{names[0]}\n") == {str(digit), str(names[0])}
    assert paths("-", stdin=f"{digit}\r\n{names[0]}\r\n") == {str(digit), str(names[0])}  # as Windows writes lists


def test_predict_says_of_a_folder_that_it_has_no_images(command, run, tmp_path):
    status, output, _ = command("predict", run, tmp_path, "--format", "json")
    assert (status, json.loads(output)["error"]) == (1, "the file cannot be read: a folder without images")


def test_a_misspelt_model_leaves_no_folder(command, tmp_path):
    status, _, errors = command("train", "digits", "--model", "tokenfusion_early_mikro", "--out", tmp_path / "run")
    assert status == 2
    assert "did you mean tokenfusion_early_micro" in errors
    assert not (tmp_path / "run").exists()


def test_predict_csv_can_be_read_back(command, run, tmp_path, digit):
    name = tmp_path / 'a "quoted",\nname.png'
    shutil.copy(digit, name)
    _, output, _ = command("predict", run, name, "--topk", 1, "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(output))
    assert list(row) == ["path", "label", "score", "error"]
    assert row["path"] == str(name)
    assert 0 < float(row["score"]) <= 1


@pytest.mark.parametrize(("topk", "named"), [(3, 3), (99, 10)])  # the run has ten classes
def test_predict_csv_has_columns_for_as_many_classes_as_are_named(command, run, digit, topk, named):
    words = ("predict", run, "no such.png", digit, "--topk", topk, "--format")
    _, output, _ = command(*words, "csv")
    bad, good = csv.DictReader(io.StringIO(output))
    columns = [("label", "score"), *((f"label_{rank}", f"score_{rank}") for rank in range(2, named + 1))]
    assert list(bad) == ["path", *(name for pair in columns for name in pair), "error"]
    _, output, _ = command(*words, "json")
    expected = json.loads(output.splitlines()[1])["topk"]
    assert [(good[label], good[score]) for label, score in columns] == [
        (row["label"], f"{row['score']:.6f}") for row in expected
    ]
    assert "No such file" in bad["error"]
    assert not any(bad[name] for pair in columns for name in pair)


UNUSED = {"scipy", "sklearn", "pandas", "pyarrow", "matplotlib", "jinja2", "tensorboard", "torchmetrics"}
UNUSED |= {"onnx", "onnxruntime", "openvino", "nncf", "bentoml", "datasets", "transformers", "torch._dynamo"}
"""What other verbs need, and takes long to import."""


def test_names_that_are_not_utf8_are_predicted_all_the_same_and_nothing_is_imported_for_other_verbs(
    learned, tmp_path, digit
):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copy(digit, name)
    words = [sys.executable, "-X", "importtime", "-m", "tokenfusion", "predict", str(learned), "-", "--format", "json"]
    done = subprocess.run(words, input=name + b"\n" + os.fsencode(digit), capture_output=True, check=True)
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] != []
    assert len(done.stdout.splitlines()) == 2
    imported = {line.rpartition(b"|")[2].strip().decode() for line in done.stderr.splitlines()}
    assert {"torch", "timm"} < imported
    assert not UNUSED & imported


def test_models_lists_costs(command):
    status, output, _ = command("models", "*_micro", "--json")
    assert status == 0
    rows = {row["name"]: row for row in json.loads(output)}
    from tokenfusion import create_model

    model = create_model("tokenfusion_early_micro")
    assert rows["tokenfusion_early_micro"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert rows["tokenfusion_early_micro"]["img_size"] == [32, 32]
    assert "tokenfusion_early_micro" in command("models", "*_micro")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "digits"], "--out is missing"),
        (["train", "--out", "x"], "DATA is missing"),
        (["train", "--dry-run"], "DATA is missing; name a folder"),
        (["train"], "DATA and --out are missing"),
        (["compare"], "DATA, --models and --out are missing"),
        (["predict"], "RUN and SOURCE are missing; `tokenfusion predict --help`"),
        (["check"], "DATA is missing"),
        (["train", "no/such", "--out", "x"], "no such file or folder"),
        (
            ["train", "digits", "--model", "tokenfusion_erly_micro", "--out", "x"],
            "did you mean tokenfusion_early_micro",
        ),
        (["train", "digits", "--epochs", "0", "--out", "x"], "epochs=0 is out of range"),
        (["train", "digits", "--img-size", "8", "9", "10", "--out", "x"], "give a height and a width"),
        (["train", "digits", "--batch-size", "128", "--accumulate", "3", "--out", "x"], "try batch_size="),
        (["train", "digits", "--recipe", "no.toml", "--out", "x"], "recipe no.toml"),
        (["train", "digits", "--lr", "1", "--resume", "x"], "leave out --lr"),
        (["train", "--resume", "x"], "not a run"),
        (["evaluate", "no-such-run"], "no-such-run: no such folder"),
        (["evaluate", "."], "is not a run"),
        (["predict", "no-such-run", "a.png"], "no-such-run: no such folder"),
        (["report", "no-such-run"], "no-such-run"),
        (["models", "nothing*"], "no model of this package matches"),
    ],
)
def test_bad_input_is_said_without_a_traceback(command, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    status, _, errors = command(*words)
    assert status == 2
    assert errors.startswith("error: ")
    assert said in errors


def test_digits_are_the_built_in_ones_though_a_folder_is_called_so(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, errors = command("train", "digits", "--model", TINY, *QUICK, "--out", "digits")
    assert status == 0, errors
    assert load_recipe(tmp_path / "digits" / "recipe.toml")["data"] == "digits"


@pytest.mark.parametrize("words", [["train", "digits", "--epochs", "many"], ["train", "digits", "--otu", "x"], ["fly"]])
def test_words_that_do_not_parse_are_refused(command, words):
    status, output, errors = command(*words)
    assert status != 0
    assert words[-1] in output + errors or words[-2] in output + errors


def test_a_run_folder_that_exists_is_not_overwritten(command, run):
    before = (run / "model.safetensors").read_bytes()
    status, _, errors = command("train", "digits", *QUICK, "--out", run)
    assert status == 2
    assert "holds a run already" in errors
    assert "--resume" in errors
    assert (run / "model.safetensors").read_bytes() == before


def test_a_users_own_recipe_is_not_overwritten(command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.toml").write_text("# dear\nlr = 0.003\n")
    words = ("train", "digits", *QUICK, "--recipe", tmp_path / "mine" / "recipe.toml", "--out", tmp_path / "mine")
    status, _, errors = command(*words)
    assert status == 2
    assert "not an empty folder" in errors
    assert (tmp_path / "mine" / "recipe.toml").read_text() == "# dear\nlr = 0.003\n"


def test_a_folder_with_other_things_is_not_written_into(command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    status, _, errors = command("train", "digits", *QUICK, "--out", tmp_path / "mine")
    assert status == 2
    assert "not an empty folder" in errors
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("verb", [["evaluate"], ["predict"]])
def test_an_incomplete_run_says_how_to_go_on(command, run, verb, digit):
    (run / "model.safetensors").unlink()
    status, _, errors = command(*verb, run, *([digit] if verb == ["predict"] else []))
    assert status == 2
    assert f"tokenfusion train --resume {run}" in errors


def test_a_run_of_a_newer_version_is_refused(command, run, digit):
    description = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(description | {"format": 99}))
    for words in (["evaluate", run], ["predict", run, digit], ["report", run]):
        status, _, errors = command(*words)
        assert status == 2
        assert "99" in errors
        assert "update" in errors


class Payload:
    """Unpickling it opens a file for writing."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_that_carry_code_are_refused_and_never_run(command, run, digit, tmp_path):
    torch.save({"weights": Payload(tmp_path / "executed")}, run / "model.safetensors")
    status, _, errors = command("predict", run, digit)
    assert status == 2
    assert "safetensors" in errors
    assert not (tmp_path / "executed").exists()


def test_weights_of_another_model_are_refused(command, run, digit):
    description = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(description | {"name": "tokenfusion_layerwise_micro"}))
    status, _, errors = command("predict", run, digit)
    assert status == 2
    assert "does not fit this model" in errors


def test_too_many_unreadable_images_are_refused_and_listed(command, tmp_path):
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "a" / "zero.png").write_bytes(b"")
    (tmp_path / "data" / "a" / "notes.txt").write_text("no image")
    out = tmp_path / "runs" / "run"
    words = ("train", tmp_path / "data", "--model", "tokenfusion_early_micro", *QUICK, "--out", out)
    status, _, errors = command(*words, "--seed", 1, "--max-skipped", 0)
    if "unreadable" not in errors:  # the empty file was drawn into the held-out part
        pytest.fail(errors)
    assert status == 2
    assert "raise --max-skipped" in errors
    assert f"leave out with --exclude what `tokenfusion check {tmp_path / 'data'}` finds" in errors
    assert "(a/zero.png: the file is empty (0 bytes))" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]  # of what is refused nothing is left
    status, output, errors = command(*words, "--seed", 1)  # one is put up with, however few there are
    assert status == 0, errors
    with (out / "skipped.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["path"], row["label"]) == ("a/zero.png", "a")
    assert "0 bytes" in row["reason"]
    assert "set aside 1 unreadable image, listed in" in output
    assert "\n1 other file ignored ('a/notes.txt': 1 no image by its name)\n" in output
    assert "\n12 training and 4 held-out images of 2 classes" in output


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(tmp_path):
    words = ("train", "digits", "--model", TINY, "--img-size", 8, "--epochs", 500, "--workers", 2)
    words += ("--out", tmp_path / "run")
    process = begin_command(said := tmp_path / "said.txt", *words)
    while not (said.exists() and "epoch 1/500" in said.read_text()):  # wait until it trains
        assert process.is_alive()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the loader processes too
    process.join(timeout=60)
    assert process.exitcode == 130
    assert f"tokenfusion train --resume {tmp_path / 'run'}" in said.read_text()
    assert "Traceback" not in said.read_text()


def test_ctrl_c_before_the_first_step_speaks_of_no_checkpoint(command, tmp_path, monkeypatch):
    def press(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "build", press)
    status, _, errors = command("train", "digits", "--img-size", 8, "--out", tmp_path / "run")
    assert status == 130
    assert f"stopped before the first checkpoint; go on with `tokenfusion train --resume {tmp_path / 'run'}`" in errors
