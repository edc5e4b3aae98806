"""Compiled models: each once, with the answers, draws and checkpoints of the model itself.

But for one test, PyTorch's own operations, traced, stand where Inductor would put compiled ones.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from timm.layers import DropPath
from torch import nn
from torch.distributed import HashStore

from runs import TINY, assert_same, interrupt_at, records_of, tiny_recipe
from tokenfusion import InputError, compiled, create_model
from tokenfusion.checkpoint import load_tensors
from tokenfusion.evaluate import evaluate
from tokenfusion.predict.many import predict_many
from tokenfusion.training import Interrupted, resume, start
from tokenfusion.training.auto.dry_run import Plan, plan_table
from tokenfusion.training.distributed.world import World
from tokenfusion.training.objective import EachSide
from tokenfusion.training.run import refuse_alone

QUIET = Console(quiet=True)
SUM = 1
"""Graphs of the sum that is tried first."""


@pytest.fixture
def graphs(monkeypatch):
    """All that is compiled, a graph each."""
    found = []

    def keep(graph, _inputs, **_options):
        found.append(graph)
        return graph

    monkeypatch.setattr(compiled, "BACKEND", keep)
    torch._dynamo.reset()
    return found


def test_a_run_is_compiled_once_as_the_same_run_and_resumes_to_the_bit(tmp_path, graphs):
    recipe = tiny_recipe(epochs=1, compile=True, precision="fp32")
    start(recipe, tmp_path / "whole", QUIET)
    assert len(graphs) == SUM + 1
    start(replace(recipe, compile=False), tmp_path / "plain", QUIET)
    assert len(graphs) == SUM + 1
    tensors, others = (load_tensors(tmp_path / run / "state" / "last.safetensors")[0] for run in ("whole", "plain"))
    assert tensors.keys() == others.keys()
    ours, theirs = (records_of(tmp_path / run) for run in ("whole", "plain"))
    assert ours[0]["train_loss"] == pytest.approx(theirs[0]["train_loss"], rel=1e-3)

    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        start(recipe, run, QUIET, listener=interrupt_at(5))
    torch._dynamo.reset()
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("compile = true", "compile = false"))
    with pytest.raises(InputError, match=r"compile=False \(it was True\) are not those that the run began with"):
        resume(run, QUIET)
    (run / "recipe.toml").write_text(text)
    resume(run, QUIET)
    assert_same(run, tmp_path / "whole")


def test_both_sides_and_what_is_dropped_are_one_graph_that_draws_as_the_model_does(graphs):
    model = create_model(TINY, num_classes=10, img_size=(8, 8), drop_path_rate=0.5)
    model.branch_dropout = 0.5
    asked, images = EachSide(model).train(), torch.randn(6, 3, 8, 8)
    answers = []
    for called in (asked, compiled.compiled(asked)):
        torch.manual_seed(3)
        answers.append(called(images))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_evaluating_compiles_once_and_finds_the_same(learned, tmp_path, graphs):
    """359 images are a batch of 256 and one of 103."""
    plain, ours = (evaluate(learned, out=tmp_path / str(wish), compile=wish) for wish in (False, True))
    assert len(graphs) == SUM + 1
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-2)
    assert ours["top1"] == pytest.approx(plain["top1"], abs=0.01)


@pytest.mark.parametrize("embeddings", [False, True])
def test_predicting_compiles_once_whatever_the_last_batch(learned, tmp_path, graphs, embeddings):
    """Two parts of 4 and 3 images, of which 3 and then 1 are in the model at once."""
    import pyarrow.parquet as pq

    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(7):
        torch.manual_seed(number)
        save_picture(photos / f"{number}.png")
    rows = {}
    for wish in (False, True):
        out = tmp_path / str(wish)
        given = {"embeddings": embeddings, "batch_size": 3, "images_per_part": 4, "compile": wish}
        predict_many(learned, [str(photos)], out, **given)
        rows[wish] = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len(graphs) == SUM + 1
    for ours, plain in zip(rows[True], rows[False], strict=True):
        assert ours["path"] == plain["path"]
        assert ours["score"] == pytest.approx(plain["score"], abs=0.02)
        if embeddings:
            assert ours["embedding"] == pytest.approx(plain["embedding"], rel=0.1, abs=0.05)


def save_picture(path):
    from PIL import Image

    Image.fromarray(torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()).save(path)


def test_a_missing_compiler_ends_a_run_before_it_begins(tmp_path):
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}),
        pytest.raises(InputError, match=r"--compile: .* \(.*/nowhere/g\+\+.*\); install a C\+\+ compiler") as refused,
    ):
        start(tiny_recipe(compile=True), tmp_path / "run", QUIET)
    assert "or leave out --compile" in str(refused.value)
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_several_processes_are_refused():
    with pytest.raises(InputError, match=r"compile=True is for one process: .* train without torchrun, or leave out"):
        refuse_alone(tiny_recipe(compile=True), World(size=2, store=HashStore()))


def test_a_plan_says_what_compiling_takes_of_a_compiled_run_alone():
    plan = Plan(**dict.fromkeys(Plan.__dataclass_fields__, 1) | {"compile_seconds": 72.0})
    said = dict(plan_table(plan, epochs_auto=False))
    assert said["compiling"] == "1 min 12 s measured, before the first step; less where it was compiled before"
    assert "compiling" not in dict(plan_table(replace(plan, compile_seconds=0.0), epochs_auto=False))


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler on this machine")
def test_inductor_draws_as_the_model_does_and_compiles_to_the_same_bits():
    """The smallest model that says so: each of its parts draws what it draws uncompiled, in the same order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), DropPath(0.5), nn.Dropout(0.5), DropPath(0.3)).train()
    rows, found = torch.randn(16, 6), []
    for called in (model, compiled.compiled(model), compiled.compiled(model)):
        torch._dynamo.reset()
        model.zero_grad()
        torch.manual_seed(1)
        with torch._inductor.config.patch({"fx_graph_cache": False, "cpp.vec_isa_ok": True}):  # written anew each time
            output = called(rows)
            output.square().sum().backward()
        found.append([output.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    eager, once, twice = found
    torch.testing.assert_close(once, eager)
    assert all(map(torch.equal, once, twice))
