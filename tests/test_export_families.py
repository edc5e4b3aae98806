"""Every family goes through folder and gate, in some format and precision, and comes out answering alike."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import _registry

from tokenfusion import Classifier, InputError
from tokenfusion.export import artefact
from tokenfusion.models.cost import count_model
from tokenfusion.recipe import Recipe, dump_recipe

CLASSES = ("blue", "green", "red")
PAIR = "fuse(wide(resnet_micro,0.2),wide(vit_micro,0.2),{})"
RUNS = {
    "crossvit": ("wide(crossvit_micro,0.25)", "onnx", "fp32", {}),
    "deepvit, gray": ("wide(deepvit_micro,0.25)", "openvino", "fp32", {"in_chans": 1}),
    "cmt, several labels": ("wide(cmt_micro,0.25)", "onnx", "fp32", {"multi_label": True}),
    "late": (PAIR.format("late"), "openvino", "fp16", {}),
    "early": (PAIR.format("early"), "openvino", "bf16", {}),
    "layerwise, several labels": (PAIR.format("layerwise"), "openvino", "fp32", {"multi_label": True}),
    "layerwise, gray": (PAIR.format("layerwise,cross"), "pt2", "fp32", {"in_chans": 1}),
    "probe": (PAIR.format("probe"), "onnx", "fp32", {}),
    "a pair with means of its own": ("fuse(resnet10t,with(vit_tiny_patch16_224,depth=1),late)", "onnx", "fp32", {}),
    "a control": ("cnn(tokenfusion_early_micro)", "openvino", "fp32", {}),
    "the other control": ("vit(tokenfusion_layerwise_micro)", "onnx", "fp32", {}),
    "timm's": ("test_efficientnet", "onnx", "fp32", {}),
}
"""Name, format, precision and task; int8 is below, for random weights leave images undecided."""

SHALLOW = {
    "crossvit_micro": {"depths": (1, 1), "encoders": 1},
    "deepvit_micro": {"depth": 1},
    "cmt_micro": {"dims": (32,), "depths": (1,), "heads": (1,), "pooling": (2,)},
    "vit_micro": {"depth": 2},
    "resnet_micro": {"strides": (2, 2, 2), "dims": (48, 96), "depths": (1, 1)},
}
"""What makes a model shallow: every block is traced alike, and takes its time."""


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Names mean models of fewer blocks."""
    count_model.cache_clear()
    for name, depths in SHALLOW.items():
        monkeypatch.setitem(_registry._model_entrypoints, name, partial(timm.model_entrypoint(name), **depths))
    yield
    count_model.cache_clear()


def save_run(folder: Path, name: str, *, in_chans: int = 3, multi_label: bool = False, size: int = 32) -> Path:
    """A finished run of random weights, in which no gate is closed, on pictures of three colours."""
    random = np.random.default_rng(0)
    data = folder / "data"
    rows = ["path,labels,split"]
    for number in range(21):
        split, colour = ("train", "val")[number % 7 > 2], number % 3
        path = data / split / CLASSES[colour] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)  # that need no resize
        pixels[..., 2 - colour] += 120
        Image.fromarray(pixels).save(path)
        rows.append(f"{path.relative_to(data)},{'|'.join({CLASSES[colour], CLASSES[number % 2]})},{split}")
    torch.manual_seed(0)
    classifier = Classifier.create(name, CLASSES, in_chans=in_chans, img_size=(size, size), multi_label=multi_label)
    for parameter in classifier.model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    replace(classifier, temperature=0.7).save(folder)
    place = data
    if multi_label:
        place = data / "list.csv"
        place.write_text("\n".join(rows))
    recipe = Recipe(data=str(place), model=name, img_size=(size, size), in_chans=in_chans)
    (folder / "recipe.toml").write_text(dump_recipe(recipe))
    return folder


def require_packages(format: str, *more: str) -> None:
    for package in (*artefact.PACKAGES[format], *more):
        pytest.importorskip(package, reason="the extra `export` is not installed")


def note_of(precision: str) -> str:
    """What is to be said on this machine."""
    if precision != "bf16":
        return ""
    import openvino

    able = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "" if able else "this CPU has no bf16; the classifier runs in fp32"


@pytest.mark.parametrize("kind", RUNS)
def test_every_family_passes_the_gate(kind, tmp_path):
    name, format, precision, task = RUNS[kind]
    require_packages(format)
    run = save_run(tmp_path / "run", name, **task)
    said = artefact.export(run, tmp_path / "out", format=format, precision=precision)
    assert (said["parity"]["n"], said["forced"]) == (12, False)
    exported, classifier = artefact.load(tmp_path / "out"), Classifier.load(run)
    assert exported.multi_label == classifier.multi_label
    assert exported.note == said["parity"]["note"] == note_of(precision)
    assert f"{said['parity']['hardware']}{f' ({exported.note})' * bool(exported.note)}." in (
        tmp_path / "out" / "README.md"
    ).read_text(encoding="utf-8")
    files = sorted(map(str, (run / "data" / "val").glob("*/*.png")))
    tolerance = 1e-4 if precision == "fp32" else 0.05
    for one, other in zip(exported.predict(files), replace(classifier, precision="fp32").predict(files), strict=True):
        assert dict(one.topk) == pytest.approx(dict(other.topk), abs=tolerance)
    assert json.loads((tmp_path / "out" / "model.json").read_text())["name"] == name


def teach(run: Path, spoil: bool = False) -> None:
    """Let a run of a CNN tell the colours: its head compares with the mean of each colour's training images.

    Args:
        run: whose weights are random.
        spoil: give the stem a channel of 10,000 everywhere, which nothing behind it looks at: fp32 answers alike, but
            of int8's 256 steps from 0 to there the other channels have none.
    """
    classifier = Classifier.load(run)
    model = classifier.model
    with torch.no_grad():
        if spoil:
            model.cnn.stem.norm.weight[0], model.cnn.stem.norm.bias[0] = 0, 1e4
            model.cnn.stages[0][0].conv.weight[:, 0] = 0
        for row, colour in enumerate(CLASSES):
            files = sorted(run.glob(f"data/train/{colour}/*.png"))
            batch = torch.stack([classifier.prepare(file)[1] for file in files])
            mean = classifier.logits_and_embeddings(batch)[1].mean(0)
            model.head.weight[row], model.head.bias[row] = mean, -mean.dot(mean) / 2
    classifier.save(run)


def test_onnx_in_int8_passes_the_gate_where_it_is_as_right_as_the_run_and_is_refused_where_it_is_not(tmp_path):
    require_packages("onnx", "nncf")
    run = save_run(tmp_path / "run", "wide(resnet_micro,0.25)")
    teach(run)
    said = artefact.export(run, tmp_path / "out", precision="int8")
    assert (said["parity"]["accuracy"], said["parity"]["accuracy_run"], said["forced"]) == (1, 1, False)
    assert said["parity"]["probability_difference"] > 1e-6  # than which fp32 differs by less
    red = next((run / "data" / "val" / "red").iterdir())
    assert artefact.load(tmp_path / "out").predict(red)[0].label == "red"
    teach(run, spoil=True)
    with pytest.raises(InputError, match=r"the onnx of int8 answers otherwise than .*accuracy falls by .*--force"):
        artefact.export(run, tmp_path / "spoilt", precision="int8")
    assert not (tmp_path / "spoilt").exists()


def test_onnx_in_int8_takes_depthwise_convolutions(tmp_path):
    require_packages("onnx", "nncf")
    run = save_run(tmp_path / "run", "mobilenetv2_035")
    artefact.export(run, tmp_path / "out", precision="int8", force=True)  # random weights leave images undecided
    red = next((run / "data" / "val" / "red").iterdir())
    exact, rounded = Classifier.load(run).predict(red)[0], artefact.load(tmp_path / "out").predict(red)[0]
    assert dict(rounded.topk) == pytest.approx(dict(exact.topk), abs=0.1)
