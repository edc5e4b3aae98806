"""Pretrained weights: what fits is loaded, what does not leaves nothing behind. timm's small test models stand in for
large ones, and a server on this machine for the hub."""

import hashlib
import json
import pickle
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import tokenfusion
from tokenfusion import Classifier, InputError, create_model
from tokenfusion.models.pretrained import fetch, local_name, place_on_hub, weighted_names
from tokenfusion.preset import FINE_TUNING, PRETRAINED_PAIR, preset

CNN, VIT = "test_efficientnet", "test_vit"
DOCS = Path(__file__).parents[2] / "docs"


def build(name, seed=0, **arguments):
    torch.manual_seed(seed)
    return timm.create_model(name, **arguments)


@pytest.fixture
def files(tmp_path):
    """Weights of a small CNN and a small transformer, by the models' names."""
    paths = []
    for name in (CNN, VIT):
        paths.append(tmp_path / f"{name}.safetensors")
        save_file(build(name).state_dict(), paths[-1])
    return paths


@pytest.mark.parametrize("name", [CNN, VIT])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_disk_make_the_model_that_they_are_of(name, suffix, tmp_path):
    original = build(name)
    path = tmp_path / f"any{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(original.state_dict(), path)
    model = create_model(name, pretrained=path).eval()
    images = torch.rand(2, 3, 160, 160)
    assert torch.equal(model(images), original.eval()(images))
    assert "state_dict" not in model.pretrained_cfg


def test_a_head_of_other_classes_is_new_and_everything_else_is_kept(files):
    model, original = create_model(CNN, pretrained=files[0], num_classes=7), build(CNN).state_dict()
    differing = {key for key, value in model.state_dict().items() if not torch.equal(value, original[key])}
    assert model.num_classes == 7
    assert differing == {"classifier.weight", "classifier.bias"}


def test_one_channel_takes_the_sum_of_three(files):
    gray = create_model(CNN, pretrained=files[0], in_chans=1)
    torch.testing.assert_close(gray.conv_stem.weight, build(CNN).conv_stem.weight.sum(1, keepdim=True))


def test_positions_are_resized_to_the_images(files):
    model = create_model(VIT, pretrained=files[1], img_size=96)
    assert model.pos_embed.shape[1] == 36 + model.num_prefix_tokens


def test_a_pair_begins_with_two_files_and_closed_gates(files):
    pair = tokenfusion.fuse(CNN, VIT, "late", pretrained=files, num_classes=1000, img_size=160).eval()
    images = torch.rand(2, 3, 160, 160)
    torch.testing.assert_close(pair(images), build(VIT).eval()(images))


def test_files_of_a_pair_in_the_wrong_order_and_of_another_model(files):
    right = re.escape(f"give --pretrained {files[0]} {files[1]} (the CNN's first)")
    with pytest.raises(InputError, match=rf"^the files are in the wrong order: .*; {right}"):
        tokenfusion.fuse(CNN, VIT, pretrained=files[::-1])
    with pytest.raises(
        InputError, match=rf"does not fit {VIT}; give weights of {VIT}, or --model {CNN}, which they fit"
    ):
        tokenfusion.fuse(CNN, VIT, pretrained=(files[0], files[0]))


@pytest.mark.parametrize("given", [["a"], ["a", "b", "c"]])
def test_another_number_of_files(given):
    with pytest.raises(InputError, match=rf"{len(given)} of 2 files that {CNN} and {VIT} begin with"):
        create_model(f"fuse({CNN},{VIT})", pretrained=given)


def test_values_that_are_not_finite_are_refused(tmp_path):
    state = build(CNN).state_dict()
    state["conv_stem.weight"][0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match=r"conv_stem\.weight has values that are not finite"):
        create_model(CNN, pretrained=tmp_path / "nan.safetensors")


class Code:
    def __reduce__(self):
        return print, ("run",)


def wrong(tmp_path, files, kind):
    path = tmp_path / "weights.pth"
    if kind == "missing":
        return path
    if kind == "pickled code":
        path.write_bytes(pickle.dumps(Code()))
    elif kind == "truncated":
        path = tmp_path / "cut.safetensors"
        path.write_bytes(files[0].read_bytes()[:5000])
    elif kind == "another model":
        return files[1]
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "no such file"),
        ("pickled code", "could carry code, and was not opened"),
        ("truncated", "is damaged, or not a file of weights; fetch it again"),
        ("another model", f"does not fit {CNN}; give weights of {CNN}"),
    ],
)
def test_bad_weights_leave_no_run_folder(kind, said, tmp_path, files, command):
    path, run = wrong(tmp_path, files, kind), tmp_path / "run"
    status, output, errors = command("train", "digits", "--model", CNN, "--pretrained", path, "--out", run)
    assert (status, run.exists()) == (2, False), output
    assert said in errors


def test_a_run_says_which_weights_it_began_with_and_resumes_without_them(tmp_path, files, command):
    run = tmp_path / "run"
    for number in range(8):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    few = ("--img-size", 32, "--epochs", 1, "--out", run)
    status, output, errors = command("train", tmp_path / "photos", "--model", CNN, "--pretrained", files[0], *few)
    assert status == 0, errors
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert f"starts from {CNN} ({files[0]}, sha256 {digest[:12]})" in output
    described = json.loads((run / "model.json").read_text())
    assert described["began_with"] == [{"model": CNN, "source": str(files[0]), "sha256": digest}]
    config = timm.get_pretrained_cfg(CNN)
    preprocess = Classifier.load(run).preprocess
    assert (preprocess.crop_pct, preprocess.interpolation) == (config.crop_pct, config.interpolation)
    files[0].unlink()
    assert command("evaluate", run)[0] == 0
    assert digest[:12] in command("evaluate", run)[1]


def test_without_a_model_a_pretrained_pair_is_chosen():
    chosen = preset("", "photos", pretrained=True)
    assert (chosen["model"], chosen["img_size"], chosen["tune"]) == (PRETRAINED_PAIR, (224, 224), "auto")
    assert preset("resnet50", "photos", pretrained=True) == FINE_TUNING


class Hub(BaseHTTPRequestHandler):
    """The hub's answers for a file: first its metadata, then its bytes."""

    content, failures, cut, asked = b"", 0, False, 0

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        Hub.asked += 1
        if Hub.failures > 0:
            Hub.failures -= 1
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("ETag", '"' + hashlib.sha256(self.content).hexdigest() + '"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if body:
            self.wfile.write(self.content[: len(self.content) // 2] if self.cut else self.content)
            self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def hub(tmp_path, files, monkeypatch):
    """The hub's own client, told to ask a server on this machine that has the CNN's weights; it waits no time."""
    constants = huggingface_hub.constants
    Hub.content, Hub.failures, Hub.cut, Hub.asked = files[0].read_bytes(), 0, False, 0
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving() as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        yield tmp_path / "cache"


@pytest.mark.usefixtures("hub")
def test_weights_of_the_hub_are_fetched_once():
    original = build(CNN).eval()
    images = torch.rand(1, 3, 160, 160)
    assert torch.equal(create_model(CNN, pretrained="hub").eval()(images), original(images))
    file = fetch(CNN)
    assert file.source == f"{timm.get_pretrained_cfg(CNN).hf_hub_id}/model.safetensors"
    assert file.to_dict()["sha256"] == hashlib.sha256(Hub.content).hexdigest()


@pytest.mark.usefixtures("hub")
def test_a_hub_that_is_busy_is_asked_again():
    Hub.failures = 3
    assert fetch(CNN).path.read_bytes() == Hub.content
    assert Hub.asked > 3


@pytest.mark.parametrize("fault", ["busy", "cut", "offline"])
def test_a_hub_that_does_not_answer_names_the_file_and_leaves_nothing(fault, hub, tmp_path, command, monkeypatch):
    Hub.failures, Hub.cut = (1000 if fault == "busy" else 0), fault == "cut"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", fault == "offline")
    run = tmp_path / "run"
    status, output, errors = command("train", "digits", "--model", CNN, "--pretrained", "hub", "--out", run)
    assert (status, run.exists()) == (2, False)
    repository = timm.get_pretrained_cfg(CNN).hf_hub_id
    assert f"for the weights of {CNN}: {repository}/model.safetensors\n" in output
    assert ("the hub does not answer; retrying in" in output) == (fault == "busy")
    assert f"{repository}/resolve/main/model.safetensors" in errors
    assert f"give --pretrained {CNN}.safetensors" in errors
    assert not list(hub.glob("models--*"))


@pytest.mark.usefixtures("hub")
def test_of_a_pair_both_files_are_named_that_are_to_be_fetched_elsewhere(tmp_path, command, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    words = ("--model", f"fuse({CNN},{VIT},late)", "--pretrained", "hub", "--out", tmp_path / "run")
    status, _, errors = command("train", "digits", *words)
    assert status == 2
    places = [f"{timm.get_pretrained_cfg(name).hf_hub_id}/resolve/main/model.safetensors" for name in (CNN, VIT)]
    assert all(f"{place} as {name}.safetensors" in errors for place, name in zip(places, (CNN, VIT), strict=True))
    assert f"put both here, and give --pretrained {CNN}.safetensors {VIT}.safetensors" in errors


@pytest.mark.parametrize("fault", ["busy", "cut", "offline"])
def test_a_check_up_says_what_it_fetches_and_fails_as_training_does(fault, hub, tmp_path, command, monkeypatch):
    Hub.failures, Hub.cut = (1000 if fault == "busy" else 0), fault == "cut"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", fault == "offline")
    words = ("--model", f"fuse({CNN},{VIT},probe)", "--pretrained", "hub", "--out", tmp_path / "found", "--json")
    status, output, errors = command("check", "digits", *words)
    assert (status, output, (tmp_path / "found").exists()) == (2, "", False)
    repository = timm.get_pretrained_cfg(CNN).hf_hub_id
    assert f"for the weights of {CNN}: {repository}/model.safetensors\n" in errors
    assert ("the hub does not answer; retrying in" in errors) == (fault == "busy")
    assert f"give --pretrained {CNN}.safetensors {VIT}.safetensors" in errors
    assert not list(hub.glob("models--*"))


def test_the_page_names_the_files_of_the_default_pair_as_they_are_fetched(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import pretrained_page

    page = pretrained_page.PAGE.read_text()
    assert f"<!-- files -->\n{pretrained_page.files()}\n<!-- /files -->" in page, "run docs/update.py"
    for name in weighted_names(PRETRAINED_PAIR):
        assert all(part in page for part in (*filter(None, place_on_hub(name)), local_name(name)))
