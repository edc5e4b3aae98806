"""When Re-attention goes by tiles on a GPU, and why not; the kernels themselves by Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from tokenfusion.layers import re_attention
from tokenfusion.layers.re_attention import why_not, why_not_here
from tokenfusion.models import create_model
from tokenfusion.models.deepvit import maps_in_words

GPU = torch.device("cuda")
INTERPRETED = Path(__file__).with_name("interpreted_re_attention.py")


@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed; it comes with PyTorch for CUDA")
def test_the_kernels_agree_with_float64_by_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--timeout", "240", INTERPRETED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=INTERPRETED.parents[2])
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout


@pytest.fixture
def a_gpu(monkeypatch):
    """As if there were a GPU on which the kernels work."""
    monkeypatch.setattr(re_attention, "find_spec", lambda _name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Some GPU")
    monkeypatch.setattr(re_attention, "trial", lambda *_case: None)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    why_not_here.cache_clear()
    yield monkeypatch
    why_not_here.cache_clear()
    torch.backends.cuda.matmul.allow_tf32 = before


class Everywhere(nn.BatchNorm2d):
    """Stands for a norm whose statistics are those of all processes."""


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d(12), Everywhere(12).eval()], ids=["none", "own", "evaluated"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_gpu_goes_by_tiles(a_gpu, norm, kind):  # noqa: ARG001
    assert why_not(12, 64, kind, GPU, norm, 0.0) is None


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("this is on cpu", {"device": torch.device("cpu")}),
        ("attn_drop_rate=0.1", {"dropout": 0.1}),
        ("LayerNorm over the heads", {"norm": nn.LayerNorm(12)}),
        ("Everywhere trains by the statistics of other processes", {"norm": Everywhere(12)}),
        ("float64 is not among float32, float16, bfloat16", {"kind": torch.float64}),
        ("64 heads of 33 channels, rounded up 4096", {"heads": 64}),
    ],
)
def test_what_is_not_for_tiles_has_a_reason(a_gpu, reason, changed):  # noqa: ARG001
    case = {"heads": 12, "width": 33, "kind": torch.bfloat16, "device": GPU, "norm": nn.BatchNorm2d(12), "dropout": 0.0}
    assert reason in why_not(**(case | changed))


def test_float32_in_full_is_not_for_tiles(a_gpu):  # noqa: ARG001
    torch.backends.cuda.matmul.allow_tf32 = False
    assert "allow TF32" in why_not(12, 33, torch.float32, GPU, None, 0.0)
    assert why_not(12, 33, torch.bfloat16, GPU, None, 0.0) is None


def without_triton(patch):
    patch.setattr(re_attention, "find_spec", lambda _name: None)


def older(patch):
    patch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))


def of_amd(patch):
    patch.setattr(torch.version, "hip", "6.4")


def failing(patch):
    patch.setattr(re_attention, "trial", lambda *_case: "the kernels do not run here (Error: why)")


def compiling(patch):
    patch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("Triton is not installed", without_triton),
        ("Some GPU is older than Ampere", older),
        ("one of AMD's", of_amd),
        ("do not run here (Error: why)", failing),
        ("compiled or exported", compiling),
    ],
)
def test_a_gpu_that_cannot_has_a_reason(a_gpu, reason, change):
    change(a_gpu)
    assert reason in why_not(12, 33, torch.bfloat16, GPU, nn.BatchNorm2d(12), 0.0)


def test_a_kind_is_tried_once_a_gpu(a_gpu):
    tried = []
    a_gpu.setattr(re_attention, "trial", lambda *case: tried.append(case))
    for heads in (3, 4, 3):
        assert why_not(heads, 8, torch.bfloat16, GPU, None, 0.0) is None
    assert tried == [(3, 8, torch.bfloat16, GPU), (4, 8, torch.bfloat16, GPU)]


def test_the_reason_is_said_once_a_model_and_only_on_a_gpu(a_gpu):  # noqa: ARG001
    model = create_model("deepvit_micro", attn_drop_rate=0.1).train()
    assert maps_in_words(model, torch.bfloat16, torch.device("cpu")) == ""
    said = maps_in_words(model, torch.bfloat16, GPU)
    assert said.startswith("Re-attention forms its maps, N² numbers a head:")
    assert said.count("attn_drop_rate") == 1
    assert maps_in_words(model.eval(), torch.bfloat16, GPU) == ""
    assert maps_in_words(create_model("cmt_micro"), torch.bfloat16, GPU) == ""


def test_a_cpu_needs_no_triton():
    with torch.no_grad():
        create_model("deepvit_micro")(torch.randn(1, 3, 32, 32))
    assert "tokenfusion.layers.re_attention_kernel" not in sys.modules
