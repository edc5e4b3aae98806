"""An exported folder answers without torch as its run does, and is refused where its parts do not fit."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional as F

from tokenfusion import Classifier
from tokenfusion.data.decode import decode_image
from tokenfusion.data.preprocess import Preprocess
from tokenfusion.export import artefact
from tokenfusion.export.gate import PIXEL_LEVELS, PIXEL_SHARE
from tokenfusion_runtime import load
from tokenfusion_runtime.__main__ import main
from tokenfusion_runtime.description import FIELDS, hash_of
from tokenfusion_runtime.engines import arithmetic
from tokenfusion_runtime.image import opened, prepare, to_rgb

ROOT = Path(__file__).parents[1]
NUMBERS = r" *[0-9]+\.[0-9]+%?"


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    return shutil.copytree(exported, tmp_path / "copied")


def test_the_command_without_torch_prints_what_the_one_with_it_does(exported, learned, digit, command, capsys):
    Image.fromarray(np.zeros((9, 9, 4), np.uint8)).save(digit.with_name("clear.png"))
    digit.with_name("bad.png").write_bytes(b"no image")
    names = sorted(map(str, digit.parent.glob("*.png")))
    for form in ("csv", "json", "table"):
        _, expected, _ = command("predict", learned, *names, "--format", form, "--topk", 3)
        assert main([str(exported), *names, "--format", form, "--topk", "3"]) == 1
        found = capsys.readouterr().out
        assert re.sub(NUMBERS, "#", found) == re.sub(NUMBERS, "#", expected)
    for one, other in zip(load(exported).predict(names), Classifier.load(learned).predict(names), strict=True):
        assert (one.label, one.error) == (other.label, other.error)
        assert one.score == pytest.approx(other.score, abs=0.02)  # a grey level, and bfloat16 in the run


def test_it_answers_without_torch_in_its_imports(exported, digit):
    code = (
        "import sys\nfrom tokenfusion_runtime.__main__ import main\n"
        f"assert main([{str(exported)!r}, {str(digit)!r}]) == 0\n"
        "assert not {'torch', 'torchvision', 'timm', 'scipy', 'tokenfusion', 'PIL.PdfImagePlugin'} & set(sys.modules)\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(artefact.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < 200_000  # kB


def test_of_pixels_that_need_no_resize_both_commands_print_the_same_lines(exported, learned, tmp_path, command, capsys):
    run = shutil.copytree(learned, tmp_path / "run")
    description = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(description | {"precision": "fp32"}))
    random, files = np.random.default_rng(0), [str(tmp_path / f"{number}.png") for number in range(9)]
    for file in files:
        Image.fromarray(random.integers(0, 256, (9, 9), dtype=np.uint8)).save(file)  # of which 8 pixels are looked at
    for form, last_digit in (("csv", 1e-6), ("json", 0.0), ("table", 0.1)):
        _, expected, _ = command("predict", run, *files, "--format", form)
        assert main([str(exported), *files, "--format", form]) == 0
        one, other = (re.split(r"([0-9]+\.[0-9]+(?:e-[0-9]+)?)", text) for text in (capsys.readouterr().out, expected))
        assert one[::2] == other[::2]
        tolerance = 1e-5 + 1.01 * last_digit
        np.testing.assert_allclose(list(map(float, one[1::2])), list(map(float, other[1::2])), rtol=0, atol=tolerance)


def test_the_lines_of_its_readme_run_it(copied, digit, capsys, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (copied / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) <= 5
    monkeypatch.chdir(copied)
    Image.open(digit).save("image.jpg")
    exec(code, {})
    assert "'label': " in capsys.readouterr().out


def test_its_readme_installs_what_the_repository_has(copied):
    """No index has the runtime, so that it is installed from the repository or a file made of it."""
    project = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text())["project"]
    text = (copied / "README.md").read_text()
    format = json.loads((copied / "model.json").read_text())["format"]
    assert format in project["optional-dependencies"]
    assert f"pip install './runtime[{format}]'" in text
    assert (
        f"pip install './{project['name'].replace('-', '_')}-{project['version']}-py3-none-any.whl[{format}]'" in text
    )
    assert "pip install 'tokenfusion" not in text
    assert "`license` in `model.json`" in " ".join(text.split())


def test_each_command_says_what_the_other_ones_folder_is(exported, learned, digit, command, capsys):
    status, _, errors = command("predict", exported, digit)
    assert (status, "`python -m tokenfusion_runtime" in errors) == (2, True)
    assert main([str(learned), str(digit)]) == 2
    assert "is no exported classifier; `tokenfusion export RUN --out DIR` writes one" in capsys.readouterr().err


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("crop_pct", "in_chans"), [(1.0, 3), (0.875, 3), (0.875, 1)])
@pytest.mark.parametrize("size", [(64, 48), (400, 30), (33, 500), (20, 21)])
def test_its_resize_is_within_the_gates_limits_of_the_runs(size, crop_pct, in_chans, interpolation):
    values = (0.5,) * in_chans
    preprocess = Preprocess((32, 40), in_chans, values, values, crop_pct, interpolation)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = preprocess.resize(F.pil_to_tensor(Image.fromarray(pixels))).numpy().astype(int)
    differences = np.abs(prepare(Image.fromarray(pixels), preprocess.to_dict()) - expected)
    assert differences.max() <= PIXEL_LEVELS
    assert (differences > 1).mean() <= PIXEL_SHARE


@pytest.mark.parametrize("options", [{"quality": 95, "subsampling": 0}, {"quality": 75}, {}])
def test_its_jpeg_decoder_is_within_a_grey_level_of_the_runs(options):
    """Of what looks like a photograph, smooth with edges, upright and turned, in colour and grey."""
    random = np.random.default_rng(0)
    for number in range(12):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        picture = coarse.resize((201 + number, 150), Image.Resampling.BICUBIC).convert(
            "L" if number % 4 == 3 else "RGB"
        )
        picture.paste(picture.crop((0, 0, 40, 40)), (100, 60))
        file = io.BytesIO()
        picture.save(file, "JPEG", **options)
        run = decode_image(file.getvalue(), max_pixels=10**6).permute(1, 2, 0).numpy().astype(int)
        with opened(file.getvalue(), 10**6) as image:
            found = np.asarray(to_rgb(image)).astype(int)
        assert np.abs(found - run).max() <= 1


def test_an_export_abstains_where_the_run_does(exported, learned):
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (8, 8), dtype=np.uint8) for _ in range(60)]
    run = Classifier.load(learned).predict(images, abstain=0.02)
    found = load(exported).predict(images, abstain=0.02)
    assert {prediction.abstains for prediction in found} == {True, False}
    differing = [one for one, other in zip(found, run, strict=True) if one.abstains != other.abstains]
    assert len(differing) <= 2  # bfloat16 in the run


def test_an_engine_says_what_it_runs_where_the_cpu_lacks_bf16():
    assert arithmetic("bf16", ["FP32", "BF16"]) == ("bf16", "")
    assert arithmetic("bf16", ["FP32", "INT8"]) == ("f32", "this CPU has no bf16; the classifier runs in fp32")
    assert arithmetic("fp32", ["FP32", "BF16"]) == ("f32", "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"export_format": 99}, "newer than the 1 that this version reads; update tokenfusion-runtime"),
        ({"classes": list("1023456789")}, "says classes[0]='1', and its copy inside model.onnx '0': one was changed"),
        ({"classes": ["a", "b"]}, "says classes=['a', 'b'], and its copy inside"),
        ({"temperature": 9.5}, "says temperature=9.5, and its copy inside model.onnx "),
        ({"surest_errors": []}, "says surest_errors=[], and its copy"),
        ({"precision": "fp16"}, "says precision='fp16', and its copy"),
        ({"graph_sha256": "0"}, "do not belong together"),
        ({"export_format": None}, "is no exported classifier"),
        ({"export_format": True}, "is no exported classifier"),
        ({"classes": 5}, "has classes=5; it is damaged"),
        ({"classes": ["a", "a"]}, "has classes=['a', 'a']"),
        ({"thresholds": [0.5]}, "has 1 thresholds for 10 classes"),
        ({"preprocess": {"in_chans": 3}}, "has preprocess="),
        ({"files": []}, "has files=[]"),
        ({"files": ["../other/model.onnx"]}, "has files=['../other/model.onnx']"),
        ({"format": ["onnx"]}, "has format=['onnx']"),
        ({"batch": -3}, "has batch=-3"),
        ({"max_pixels": "many"}, "has max_pixels='many'"),
        ({"surest_errors": [{"images": 4, "ranks": [1], "scores": []}]}, "has surest_errors="),
        ({"precision": "fp8"}, "has precision='fp8'"),
    ],
)
def test_a_folder_whose_parts_do_not_fit_is_refused(copied, digit, capsys, change, said):
    description = json.loads((copied / "model.json").read_text())
    (copied / "model.json").write_text(json.dumps(description | change))
    assert main([str(copied), str(digit)]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_says_too_little_is_refused(copied, digit, capsys):
    description = json.loads((copied / "model.json").read_text())
    for key in FIELDS:
        left = {name: value for name, value in description.items() if name != key}
        (copied / "model.json").write_text(json.dumps(left))
        assert main([str(copied), str(digit)]) == 2
        assert f"model.json lacks {key}; it is damaged, export again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "with_copy", "without"),
    [
        (
            lambda said: said["preprocess"].update(img_size=[16, 16]),
            "says preprocess['img_size'][0]=16, and its copy inside model.onnx 8: ",
            "the graph takes no images of (1, 3, 16, 16): ",
        ),
        (
            lambda said: said["classes"].pop(),
            "says classes=['0', '1', '2', '3', '4', '5', '6', '7', '8'], and its copy inside model.onnx ",
            "gives 10 scores an image and model.json names 9 classes",
        ),
    ],
)
def test_a_graph_of_another_shape_is_refused_by_its_copy_of_the_description_and_else_by_itself(
    copied, digit, capsys, change, with_copy, without
):
    import onnx

    description = json.loads((copied / "model.json").read_text())
    change(description)
    (copied / "model.json").write_text(json.dumps(description))
    assert main([str(copied), str(digit)]) == 2
    assert with_copy in capsys.readouterr().err
    graph = onnx.load(copied / "model.onnx")
    del graph.metadata_props[:]
    onnx.save(graph, copied / "model.onnx")
    description["graph_sha256"] = hash_of([copied / "model.onnx"])
    (copied / "model.json").write_text(json.dumps(description))
    assert main([str(copied), str(digit)]) == 2
    assert without in capsys.readouterr().err


def test_a_graph_that_its_engine_cannot_read_is_refused(copied, digit, capsys):
    """As one of a newer engine, which belongs to its model.json."""
    description = json.loads((copied / "model.json").read_text())
    (copied / "model.onnx").write_bytes(b"of the future" * 99)
    description["graph_sha256"] = hash_of([copied / "model.onnx"])
    (copied / "model.json").write_text(json.dumps(description))
    assert main([str(copied), str(digit)]) == 2
    assert "copied cannot be run: " in (said := capsys.readouterr().err)
    assert "update the engine, or export again" in said


def test_a_damaged_graph_is_refused(copied, digit, capsys):
    graph = copied / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    assert main([str(copied), str(digit)]) == 2
    assert "the graph is damaged" in capsys.readouterr().err
    graph.unlink()
    assert main([str(copied), str(digit)]) == 2
    assert "lacks its graph" in capsys.readouterr().err
