"""A run on its way to a hub and back, with the hub's own client; and as a folder of timm's and transformers'."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from fakehub import TOKEN, serving
from tokenfusion.checkpoint import save_tensors
from tokenfusion.classifier import Classifier
from tokenfusion.errors import InputError
from tokenfusion.model_card import model_card
from tokenfusion.publish import NAMES, write_folder

REPO = "lab/digits"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def some_digits(count=3):
    values = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    return [np.repeat(image[..., None], 3, axis=2) for image in values]


def untrained(folder, name, classes=("cat", "dog", "owl"), **arguments):
    """A finished run of an untrained model."""
    folder.mkdir()
    torch.manual_seed(0)
    classifier = Classifier.create(name, classes, device=torch.device("cpu"), precision="fp32", **arguments)
    classifier.save(folder)
    (folder / "recipe.toml").write_text('data = "/home/somebody/secret/photos"\nepochs = 3\n')
    return folder


def test_nothing_is_sent_unless_it_is_meant(hub, command, run):
    status, output, _ = command("push", run, REPO)
    assert status == 0
    assert f"would be sent to {REPO} (private)" in output
    assert all(name in output and (run / "hub" / name).exists() for name in NAMES)
    assert hub.requests == []


def test_what_was_sent_is_what_is_loaded(hub, command, run, digit):
    status, output, errors = command("push", run, REPO, "--send")
    assert (status, errors) == (0, "")
    assert "sent to http://127.0.0.1" in output
    assert hub.private == {REPO: True}
    assert hub.commits[REPO][-1][1].keys() == {".gitattributes", *NAMES}
    here = Classifier.load(run).predict(some_digits())
    assert Classifier.load(f"hf://{REPO}").predict(some_digits()) == here
    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert fetched == {"model.json", "model.safetensors"}
    status, output, _ = command("predict", f"hf://{REPO}", digit, "--format", "json")
    assert status == 0
    assert json.loads(output)["label"] == Classifier.load(run).predict(digit)[0].label


def test_both_files_are_of_one_commit(hub, command, run, tmp_path):
    command("push", run, REPO, "--send")
    first = hub.commits[REPO][-1][0]
    other = untrained(tmp_path / "other", "resnet_micro", img_size=(8, 8))
    shutil.copy(other / "model.json", other / "model.json.bak")
    command("push", other, REPO, "--send")
    assert Classifier.load(f"hf://{REPO}").classes == ("cat", "dog", "owl")
    assert Classifier.load(f"hf://{REPO}@{first}").predict(some_digits()) == Classifier.load(run).predict(some_digits())


def test_a_hub_that_is_away_is_not_needed_again(hub, command, run):
    command("push", run, REPO, "--send")
    expected = Classifier.load(f"hf://{REPO}").predict(some_digits())
    hub.shutdown()
    hub.server_close()
    assert Classifier.load(f"hf://{REPO}").predict(some_digits()) == expected


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("hf://lab", r"'hf://lab' names no model of a hub; write hf://ORG/NAME"),
        ("hf://lab/none", r"lab/none on the hub: .*; check the name"),
        (f"hf://{REPO}@v9", r"it has no such revision; give a branch"),
        ("hf://lab/empty", r"it has no model\.json"),
    ],
)
def test_what_a_hub_does_not_have_is_refused_in_words(hub, command, run, place, message):
    command("push", run, REPO, "--send")
    hub.private["lab/empty"] = False
    hub.commit("lab/empty", {"model.safetensors": b"", "modeling.py": b"raise SystemExit"})
    with pytest.raises(InputError, match=message):
        Classifier.load(place)


@pytest.mark.usefixtures("hub")
def test_without_access_nothing_is_sent(command, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    status, _, errors = command("push", run, REPO, "--send")
    assert status == 2
    assert "access is refused" in errors
    assert "hf auth login" in errors


def test_a_public_repository_gets_nothing_private(hub, command, run):
    hub.private[REPO] = False
    hub.commit(REPO, {})
    status, _, errors = command("push", run, REPO, "--send")
    assert status == 2
    assert "public; give --public, or another name" in errors
    assert hub.commits[REPO][-1][1] == {}
    assert command("push", run, REPO, "--send", "--public")[0] == 0
    for name in ("digits", "../digits", "ü/digits", "lab/" + "d" * 99):
        status, _, errors = command("push", run, name)
        assert (status, "names no repository; write ORG/NAME" in " ".join(errors.split())) == (2, True)


EXPRESSIONS = {
    "registered": ("tokenfusion_layerwise_micro", (32, 32)),
    "two wishes of mean and std": ("fuse(resnet_micro,vit_tiny_patch16_224,late)", (32, 32)),
    "wide": ("wide(resnet_micro,0.5)", (24, 40)),
    "timm's": ("mobilenetv3_small_050", (32, 32)),
}


@pytest.mark.parametrize(("name", "size"), EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_timm_and_transformers_build_the_same_model(name, size, tmp_path):
    run = untrained(tmp_path / "run", name, img_size=size)
    write_folder(run, tmp_path / "folder", REPO)
    classifier = Classifier.load(run)
    batch = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    expected, images = classifier.logits(batch), classifier.to_input(batch)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert theirs.num_classes == 3
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "folder").eval()
    assert wrapped.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), expected)
        torch.testing.assert_close(wrapped(images).logits, expected)


def test_timms_own_transform_prepares_images_as_the_run_does(tmp_path):
    run = untrained(tmp_path / "run", "deepvit_micro", img_size=(32, 32))
    write_folder(run, tmp_path / "folder", REPO)
    classifier = Classifier.load(run)
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    prepare = create_transform(**resolve_model_data_config(model), is_training=False)
    pixels = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    _, ours = classifier.prepare(pixels)
    level = 1 / 255 / min(classifier.preprocess.std)
    torch.testing.assert_close(
        prepare(Image.fromarray(pixels)), classifier.to_input(ours[None])[0], rtol=0, atol=1.01 * level
    )


def test_a_folder_of_another_model_is_not_written(run, monkeypatch):
    create = timm.create_model

    def another(*arguments, **options):
        model = create(*arguments, **options)
        with torch.no_grad():
            model.get_classifier().bias += 1e-3
        return model

    monkeypatch.setattr("tokenfusion.publish.timm.create_model", another)
    with pytest.raises(InputError, match="timm builds another model"):
        write_folder(run, run / "hub", REPO)


def test_the_card_says_what_was_measured(command, run):
    assert command("evaluate", run)[0] == 0
    command("push", run, REPO)
    card, result = (run / "hub" / "README.md").read_text(), json.loads((run / "evaluation.json").read_text())
    low, high = result["top1_ci95"]
    assert f"| accuracy | {result['top1']:.2%} | {low:.2%} to {high:.2%} |" in card
    assert f"differ by {result['ece']:.2%} on average (95 % interval" in card
    assert f"divide logits by {json.loads((run / 'model.json').read_text())['temperature']:.4g}." in card
    for name, scores in result["per_class"].items():
        precision = "–" if scores["precision"] is None else f"{scores['precision']:.2%}"
        assert f"| {name} | {scores['n']} | {precision} |" in card
    assert "| epochs | 4 |" in card
    assert "|  |" not in card.partition("## Training")[2].partition("## Results")[0]  # settings of nothing
    assert f"| cross-entropy before calibration | {result['loss']:.4f} |" in card
    assert "equal to the bit" in card
    assert card.startswith("---\nlibrary_name: timm\n")
    (run / "hub" / "README.md").write_text("mine")
    command("push", run, REPO)
    assert (run / "hub" / "README.md").read_text() == "mine"


def test_the_card_keeps_secrets_and_no_markup(tmp_path):
    run = untrained(tmp_path / "run", "resnet_micro", ("a|b", "<script>", "c\nd"), img_size=(8, 8))
    write_folder(run, tmp_path / "folder", REPO)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "somebody" not in card
    assert "`photos`" in card
    assert r"a\|b" in card
    assert "<script>" not in card
    assert "has not been measured" in card


def test_the_card_of_many_labels_and_classes():
    scores = {"precision": 0.5, "recall": None, "f1": 0.25, "n": 3}
    description = {
        "name": "vit_micro", "classes": [f"c{i}" for i in range(60)], "multi_label": True, "hardware": "CPU",
        "parameters": 1, "macs": 1, "preprocess": {"img_size": [8, 8], "in_chans": 1}, "versions": {"tokenfusion": "1"},
        "temperature": 1.0,
    }  # fmt: skip
    measured = {
        "multi_label": True, "map": None, "map_ci95": None, "f1_macro": 0.5, "f1_micro": None, "loss": 1.0, "n": 9,
        "data": "photos", "split": "val", "skipped": 2, "per_class": dict.fromkeys(description["classes"], scores),
    }  # fmt: skip
    card = model_card(REPO, description, {}, measured, 4)
    assert "| mean average precision | – |" in card
    assert card.count("| 3 | 50.00% | – | 25.00% |") == 50
    assert "2 unreadable ones left out" in card
    assert "c0, c1" in card


def test_weights_say_their_format(tmp_path):
    from safetensors import safe_open

    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
