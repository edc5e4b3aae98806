"""What a run survives besides being killed: memory that runs out, bad losses, data that fails."""

import copy
import itertools
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from children import begin
from runs import after_step, assert_same, interrupt_at, records_of, tiny_recipe
from tokenfusion.checkpoint import load_tensors
from tokenfusion.errors import InputError
from tokenfusion.hardware import is_out_of_memory
from tokenfusion.training import Interrupted, prepare, resume, start, step
from tokenfusion.training.muon import Muon
from tokenfusion.training.optimizer import make_optimizer
from tokenfusion.training.state import TrainState

QUIET = Console(quiet=True)


@pytest.fixture
def written():
    """A console, and what was written to it."""
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere, record=True, width=1000)
        yield console, lambda: console.export_text(clear=False)


def before_step(monkeypatch, number, act):
    """Do something just before the gradients of a step, counted from 1, are computed."""
    compute = step.compute_gradients

    def compute_after(setup, state, inputs, targets):
        if state.progress.step + 1 == number:
            act(state, inputs, targets)
        return compute(setup, state, inputs, targets)

    monkeypatch.setattr(step, "compute_gradients", compute_after)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing befell."""
    run = tmp_path_factory.mktemp("straight") / "run"
    start(tiny_recipe(), run, QUIET)
    return run


# Memory


@pytest.fixture
def build_hungry(monkeypatch):
    """Let models built from now on, while they train, fail behind the last layer on more than so many images."""
    build = prepare.build

    def hunger(most, error=torch.OutOfMemoryError):
        def refuse(model, _inputs, output):
            if model.training and len(output) > most:
                raise error("CUDA out of memory. Tried to allocate 20.00 GiB")

        def build_hungry(*arguments, **named):
            classifier = build(*arguments, **named)
            classifier.model.register_forward_hook(refuse)
            return classifier

        monkeypatch.setattr(prepare, "build", build_hungry)

    return hunger


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_batch_that_does_not_fit_is_computed_in_twice_as_many_parts(build_hungry, tmp_path, written, error):
    """As if it had been from the start: statistics of BatchNorm, gradients and random draws of the attempt are gone."""
    console, text = written
    changes = {"epochs": 2, "mixup": 0.2, "drop_path": 0.3}
    start(tiny_recipe(**changes, accumulate=4), tmp_path / "from the start", QUIET)
    build_hungry(32, error)
    start(tiny_recipe(**changes), tmp_path / "run", console)
    assert_same(tmp_path / "run", tmp_path / "from the start", but={"out_of_memory"})
    assert text().count("memory ran out") == 2  # 128 images, then 64
    assert "from step 1 on, batches are computed in 4 parts; they are as large as before, but BatchNorm" in text()
    records = records_of(tmp_path / "run")
    assert [record["out_of_memory"] for record in records] == [2, 0]
    assert [record["accumulate"] for record in records] == [4, 4]


def test_a_resumed_run_keeps_the_parts(build_hungry, tmp_path, written):
    console, text = written
    build_hungry(64)
    start(tiny_recipe(), tmp_path / "whole", QUIET)
    with pytest.raises(Interrupted):
        start(tiny_recipe(), tmp_path / "run", QUIET, listener=interrupt_at(5))
    resume(tmp_path / "run", console)
    assert "memory ran out" not in text()
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_one_image_at_a_time_that_does_not_fit_is_refused(build_hungry, tmp_path):
    build_hungry(0)
    recipe = tiny_recipe(model="vit_micro", batch_size=3)  # in 2 parts, in 3, and no more
    with pytest.raises(InputError, match=r"memory ran out .* with one image at a time; .*--img-size"):
        start(recipe, tmp_path / "run", QUIET)


def starve(run: Path) -> None:
    """Train under a limit of the kernel that a whole batch's activations do not fit into, but the optimiser does."""
    import resource

    def limit(state, _inputs, _targets):
        model = copy.deepcopy(state.model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        make_optimizer(model, recipe).step()  # oneDNN compiles kernels, which takes memory of its own
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 300 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

    recipe = tiny_recipe(model="resnet_micro", batch_size=1024, img_size=(32, 32), epochs=1)
    before_step(pytest.MonkeyPatch(), 1, limit)
    start(recipe, run, QUIET)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not limit a process's memory so")
def test_memory_that_really_runs_out(tmp_path):
    process = begin(starve, tmp_path / "run")
    process.join()
    assert process.exitcode == 0
    (record,) = records_of(tmp_path / "run")
    assert record["accumulate"] == 2 ** record["out_of_memory"] > 1
    changes = {"model": "resnet_micro", "batch_size": 1024, "img_size": (32, 32), "epochs": 1}
    start(tiny_recipe(**changes, accumulate=record["accumulate"]), tmp_path / "from the start", QUIET)
    assert_same(tmp_path / "run", tmp_path / "from the start", but={"out_of_memory"})


def fail_once(monkeypatch, owner, name, at, before=lambda *_: None):
    """Let memory run out in a call of a function, counted from 1, after something was done."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments, **options):
        if next(calls) == at:
            before(*arguments)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


def move_some(optimizer):
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].add_(1)


@pytest.mark.parametrize(
    ("owner", "name", "before"),
    [(Muon, "step", move_some), (TrainState, "update_average", lambda _: None)],
    ids=["optimizer", "average"],
)
def test_memory_that_runs_out_while_weights_move_ends_the_run_which_then_resumes(
    tmp_path, monkeypatch, owner, name, before, straight
):
    """The step cannot be taken again: some weights have moved."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_once(patch, owner, name, 15, before)
        said = r"memory ran out \(.*\) while step 15 changed the weights, .* last good .* and go on with `.*--resume"
        with pytest.raises(InputError, match=said):
            start(tiny_recipe(), run, QUIET)
    assert load_tensors(run / "state" / "last.safetensors")[1]["step"] == 11  # the end of the epoch before
    resume(run, QUIET)
    assert_same(run, straight)


def test_memory_that_runs_out_between_gradients_and_weights_takes_the_step_again(tmp_path, monkeypatch):
    start(tiny_recipe(epochs=1, accumulate=2), tmp_path / "from the start", QUIET)
    fail_once(monkeypatch, torch.nn.utils, "clip_grad_norm_", 1)
    start(tiny_recipe(epochs=1), tmp_path / "run", QUIET)
    assert_same(tmp_path / "run", tmp_path / "from the start", but={"out_of_memory"})


def test_what_means_that_memory_ran_out():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(other.value)


# Bad losses


def spoil(_state, inputs, _targets):
    inputs[0, 0, 0, 0] = torch.nan


def test_a_bad_loss_stops_and_names_the_step_and_its_images(tmp_path, monkeypatch):
    before_step(monkeypatch, 14, spoil)
    names = r"digits:\d+, digits:\d+, digits:\d+ and 125 more"
    with pytest.raises(InputError, match=rf"the loss is nan at step 14 \(epoch 2, batch 3: {names}\); .*lower --lr"):
        start(tiny_recipe(), tmp_path / "run", QUIET)


def test_a_gradient_that_is_not_finite_is_bad(tmp_path, monkeypatch):
    def spoil_gradients(state, _inputs, _targets):
        state.model.get_classifier().weight.register_hook(lambda gradient: gradient / 0)

    before_step(monkeypatch, 3, spoil_gradients)
    with pytest.raises(InputError, match=r"the gradient's norm is (nan|inf) at step 3"):
        start(tiny_recipe(clip_grad=0.0), tmp_path / "run", QUIET)


# Data


@pytest.fixture
def photos(tmp_path):
    """120 images in two classes, of noise around two shades."""
    generator = np.random.default_rng(0)
    for index in range(120):
        pixels = generator.integers(0, 100, (8, 8, 3), dtype=np.uint8) + 100 * (index % 2)
        path = tmp_path / "photos" / str(index % 2) / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "photos"


def recipe_of(photos, workers=0):
    return tiny_recipe(data=str(photos), batch_size=16, cache_mb=0, workers=workers, save_minutes=99.0)


def turn(path):
    with Image.open(path) as image:
        turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.save(path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (Path.unlink, r"\.png: the file cannot be read: No such file or directory; it was readable before, restore it"),
        (turn, r"\.png: its pixels have changed since the run read them; restore it"),
    ],
    ids=["vanished", "changed"],
)
def test_an_image_that_vanishes_or_changes_ends_the_run_until_it_is_restored(photos, tmp_path, workers, harm, said):
    start(recipe_of(photos), tmp_path / "whole", QUIET)
    files = {path: path.read_bytes() for path in photos.rglob("*.png")}
    run = tmp_path / "run"
    harmful = after_step(2, lambda: [harm(path) for path in files])
    with pytest.raises(InputError, match=rf"{said}; all is saved up to step \d+: then go on with `.*--resume"):
        start(recipe_of(photos, workers), run, QUIET, listener=harmful)
    _, progress = load_tensors(run / "state" / "last.safetensors")
    assert progress["step"] >= 2
    for path, data in files.items():
        path.write_bytes(data)  # with another date
    resume(run, QUIET)
    assert_same(run, tmp_path / "whole")


def test_other_pixels_under_the_same_names_are_no_data_to_go_on_with(photos, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        start(recipe_of(photos), run, QUIET, listener=interrupt_at(2))
    turn(next(photos.rglob("*.png")))
    with pytest.raises(InputError, match=r"pixels of the .* images are not those that the run began with"):
        resume(run, QUIET)


def kill_a_worker():
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def test_a_worker_killed_by_the_system_ends_the_run_which_then_resumes(photos, tmp_path):
    start(recipe_of(photos), tmp_path / "whole", QUIET)
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"a loader process died .*fewer workers.*; all is saved up to step \d+"):
        start(recipe_of(photos, workers=1), run, QUIET, listener=after_step(1, kill_a_worker))
    resume(run, QUIET)
    assert_same(run, tmp_path / "whole")
