"""Several processes that train together do what one does, end together and go on together: by gloo, on a CPU."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.distributed.tensor import DTensor

from group import free_port, launch, options, run_all, said_by, train_or_resume
from killing import WRITES, die_by
from runs import assert_same, results, tiny_recipe
from tokenfusion.checkpoint import load_tensors
from tokenfusion.data.sampler import Share
from tokenfusion.errors import InputError
from tokenfusion.evaluate import evaluate
from tokenfusion.launch import Launch, first_host, read_launch
from tokenfusion.training import build, resume, start, step
from tokenfusion.training import run as run_module
from tokenfusion.training.distributed import process_group, world
from tokenfusion.training.distributed.fsdp import load_shards
from tokenfusion.training.distributed.process_group import processes

QUIET = Console(quiet=True)


def train_and_note(rank, recipe, run):
    """Train, and note the loss of each step."""
    losses, train_step = [], step.train_step

    def step_and_note(*args):
        result = train_step(*args)
        losses.append(result[0])
        return result

    step.train_step = step_and_note
    start(recipe, run, QUIET)
    Path(f"{run}.{rank}.json").write_text(json.dumps(losses))


def losses_of(size, recipe, run):
    assert run_all(size, train_and_note, recipe, run) == [0] * size
    first, *others = [json.loads(Path(f"{run}.{rank}.json").read_text()) for rank in range(size)]
    assert all(losses == first for losses in others)
    return first


CALM = {"epochs": 1, "precision": "fp32", "drop_path": 0.0, "mixup": 0.2, "cutmix": 1.0}
"""Everything but dropout, at rates so low that the rounding of sums does not grow into another course of training."""


def test_the_loss_curve_and_the_metrics_do_not_depend_on_the_number_of_processes(tmp_path):
    recipe = tiny_recipe(**CALM | {"lr": 5e-5})
    curves = {size: losses_of(size, recipe, tmp_path / f"{size}") for size in (1, 2, 4)}
    assert len(curves[1]) == 11
    records = {size: json.loads((tmp_path / f"{size}" / "metrics.jsonl").read_text()) for size in curves}
    for size in (2, 4):
        assert curves[size] == pytest.approx(curves[1], abs=1e-5)
        measured = evaluate(tmp_path / f"{size}")  # in this process alone
        assert measured["n"] == 359  # does not divide by 2 or 4
        assert records[size]["val_top1"] == pytest.approx(measured["top1"], abs=1e-7)
        assert records[size]["val_loss"] == pytest.approx(measured["loss"], abs=1e-5)
        assert records[size]["train_top1"] == pytest.approx(records[1]["train_top1"], abs=2 / 1408)


def test_batches_computed_in_parts_are_shared_part_by_part(tmp_path):
    recipe = tiny_recipe(**CALM | {"lr": 2e-5, "optimizer": "adamw", "accumulate": 2})
    alone, together = (losses_of(size, recipe, tmp_path / f"{size}") for size in (1, 2))
    assert together == pytest.approx(alone, abs=1e-5)


def test_each_side_is_asked_by_several_processes_as_by_one(tmp_path):
    recipe = tiny_recipe(**CALM | {"lr": 2e-5, "optimizer": "adamw", "side_loss": 1.0})
    alone, together = (losses_of(size, recipe, tmp_path / f"{size}") for size in (1, 2))
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_share_is_a_slice_of_each_part_with_the_image_before_it():
    batch = [(0, index) for index in range(12)]
    shares = [Share(rank, processes=2, parts=3, before=True).take(batch) for rank in range(2)]
    assert [index for _, index in shares[0]] == [11, 0, 1, 3, 4, 5, 7, 8, 9]
    assert [index for _, index in shares[1]] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    own = Share(1, processes=2, parts=3, before=True).drop_before(torch.tensor([i for _, i in shares[1]]))
    assert own.tolist() == [2, 3, 6, 7, 10, 11]


RECIPE = tiny_recipe(epochs=2, mixup=0.2, cutmix=1.0, save_minutes=0.0, patience=9)  # a checkpoint after every step


def wait_for_checkpoints(run, count, group):
    """Wait until a run has written so many, or is over."""
    checkpoint = run / "state" / "last.safetensors"
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    while count and all(process.is_alive() for process in group):
        group[0].join(timeout=0.01)
        now = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        count -= now != before
        before = now


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert run_all(2, train_or_resume, RECIPE, run) == [0, 0]
    return run


def train_and_die(rank, recipe, run, victim, death):
    """Train; one of the processes is killed once all of them have begun."""
    fit = run_module.fit

    def fit_and_die(*words):
        if rank == victim:
            die_by(death)
        return fit(*words)

    run_module.fit = fit_and_die
    train_or_resume(rank, recipe, run)


def test_killing_one_again_and_again_ends_the_other_with_the_reason_and_both_go_on_bit_equal(whole, tmp_path):
    run = tmp_path / "run"
    for death in (("time", 0.3), *zip(WRITES, (4, 3, 5, 4), strict=True)):
        victim = int(death[0] == "time")  # in a write the one that writes
        group = launch(2, train_and_die, RECIPE, run, victim, death)
        for process in group:
            process.join(timeout=240)
        assert (group[victim].exitcode, group[1 - victim].exitcode) == (-signal.SIGKILL, 2), death
        said = said_by(run)[1 - victim]
        assert "lost another one" in said
        assert "tokenfusion train --resume" in said
    assert run_all(2, train_or_resume, RECIPE, run) == [0, 0]
    assert_same(run, whole)
    assert [path.name for path in (run / "state").iterdir()] == ["last.safetensors"]


def test_sigterm_to_one_stops_all_after_the_same_step_and_a_checkpoint(whole, tmp_path):
    run = tmp_path / "run"
    group = launch(2, train_or_resume, RECIPE, run)
    wait_for_checkpoints(run, 3, group)
    group[1].terminate()
    for process in group:
        process.join(timeout=240)
    assert [process.exitcode for process in group] == [130, 130]
    assert ["stopped and saved; go on with" in said for said in said_by(run)] == [True, False]
    assert run_all(2, train_or_resume, RECIPE, run) == [0, 0]
    assert_same(run, whole)


def test_what_two_processes_saved_one_goes_on_with_and_says_what_that_means(whole, tmp_path):
    run = tmp_path / "run"
    group = launch(2, train_or_resume, RECIPE, run)
    wait_for_checkpoints(run, 12, group)
    for process in group:
        process.kill()
        process.join()
    resume(run, Console(file=(lines := io.StringIO()), width=1000))
    assert "saved by 2 processes, and 1 go on" in lines.getvalue()
    assert "\n\n" not in lines.getvalue()
    (_, records, steps_done), (_, expected, steps) = results(run), results(whole)
    assert steps_done == steps
    assert records[-1]["val_top1"] == pytest.approx(expected[-1]["val_top1"], abs=0.1)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set and RANK is not; start with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=0 is set and MASTER_ADDR is not"),
        ({"RANK": "2"}, "this is process 2 of 2, which are numbered from 0 to 1; give each process a RANK of its own"),
        ({"RANK": "one"}, "RANK='one' is not a whole number"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NODELIST": ""}, "SLURM_NODELIST='' names no machine"),
    ],
)
def test_wrong_variables_are_refused(variables, said):
    if list(variables) == ["RANK"]:
        variables = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "9"} | variables
    with pytest.raises(InputError, match=re.escape(said)):
        read_launch(variables)


def test_slurm_says_who_is_who():
    variables = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
    place = read_launch(variables | {"SLURM_NODELIST": "gpu[003-004,010]-ib,login"})
    assert place == Launch(rank=5, size=8, local_rank=1, master="gpu003-ib", port=23456)
    assert first_host("a12,b[1-2]") == "a12"
    assert read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None
    assert read_launch({}) is None


def in_place(monkeypatch, rank, port, seconds=1):
    for module in (process_group, world):
        monkeypatch.setattr(module, "JOIN", timedelta(seconds=seconds))
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))


def test_a_process_that_does_not_come_is_waited_for_within_a_limit(monkeypatch):
    in_place(monkeypatch, 0, free_port())
    with (
        pytest.raises(InputError, match=r"process 0 waited 1 s for process 1 of 2, in vain; start all of them"),
        processes(),
    ):
        pass


def test_a_master_that_cannot_be_reached_is_named(monkeypatch):
    port = free_port()
    in_place(monkeypatch, 1, port)
    with pytest.raises(InputError, match=f"process 1 of 2 found nobody at 127.0.0.1:{port} within 1 s"), processes():
        pass


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        in_place(monkeypatch, 0, port)
        with pytest.raises(InputError, match=f"127.0.0.1:{port} cannot be listened on .*give another one"), processes():
            pass


def train_changed(rank, folders, recipes, run):
    """Processes that were started in different folders or with different options."""
    os.chdir(folders[rank])
    train_or_resume(rank, recipes[rank], run)


def test_different_recipes_are_refused_and_the_process_and_field_named(tmp_path):
    run, recipes = tmp_path / "run", [RECIPE, replace(RECIPE, lr=0.005, weight_decay=0.1)]
    assert run_all(2, train_changed, [tmp_path, tmp_path], recipes, run) == [2, 2]
    assert "process 1 has lr=0.005, and process 0 has lr=0.004; start every process with the same" in said_by(run)[0]
    assert not run.exists()


def images_in(folder, names):
    for label in ("a", "b"):
        (folder / "images" / label).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (8, 8)).save(folder / "images" / label / f"{name}.png")
    return folder


def test_different_data_is_refused(tmp_path):
    folders = [images_in(tmp_path / "0", "12345"), images_in(tmp_path / "1", "12346")]
    recipe = tiny_recipe(data="images", batch_size=4)
    assert run_all(2, train_changed, folders, [recipe, recipe], tmp_path / "run") == [2, 2]
    said = said_by(tmp_path / "run")[0]  # by the first image, where process 0 has drawn the split before
    assert "the training images=" in said or "image 4 was" in said


def test_what_fails_in_one_process_ends_both_with_its_reason(tmp_path):
    folders = [images_in(tmp_path / "0", "12345"), tmp_path]
    recipe = tiny_recipe(data="images", batch_size=4)
    assert run_all(2, train_changed, folders, [recipe, recipe], tmp_path / "run") == [2, 2]
    first, second = said_by(tmp_path / "run")
    assert "process 1 of 2 ended: " in first
    assert "images" in second


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(tmp_path):
    recipe = tiny_recipe(batch_size=126, accumulate=2)
    assert run_all(2, train_or_resume, recipe, tmp_path / "run") == [2, 2]
    said = "batches of 126 images do not divide among 2 processes with accumulate=2; give --batch-size 124"
    assert said in said_by(tmp_path / "run")[0]
    assert not (tmp_path / "run" / "model.json").exists()


def test_torchrun_trains_and_one_process_of_it_ends_bit_equal_to_training_without(tmp_path):
    recipe = tiny_recipe(epochs=1, data="digits")
    start(recipe, tmp_path / "alone", QUIET)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port", free_port()]
    words += ["-m", "tokenfusion", "train", "--out", tmp_path / "run", *options(recipe)]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it
    subprocess.run(list(map(str, words)), check=True, capture_output=True, env=threads)
    assert_same(tmp_path / "run", tmp_path / "alone")


SHARED = replace(RECIPE, optimizer="adamw", parallel="fsdp", epochs=1)


def train_and_count(rank, recipe, run):
    """Train, and count the tensors that are gathered from all processes."""
    gathered, full_tensor = [], DTensor.full_tensor

    def gather_and_count(tensor, **options):
        gathered.append(1)
        return full_tensor(tensor, **options)

    DTensor.full_tensor = gather_and_count
    start(recipe, run, QUIET)
    Path(f"{run}.{rank}.json").write_text(json.dumps(len(gathered)))


@pytest.fixture(scope="module")
def whole_shared(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole shared") / "run"
    assert run_all(2, train_and_count, SHARED, run) == [0, 0]
    return run


def test_shared_weights_are_gathered_once_an_epoch_and_once_at_the_end(whole_shared):
    parameters = len(list(build(SHARED, tuple("0123456789")).model.parameters()))
    norms, epochs = 11, 1  # a gradient's norm at each step
    for rank in range(2):
        gathered = json.loads(Path(f"{whole_shared}.{rank}.json").read_text())
        assert gathered == norms + (epochs + 1) * parameters


def test_shared_weights_learn_as_whole_ones_do(tmp_path):
    recipe = tiny_recipe(**CALM | {"lr": 2e-5, "optimizer": "adamw", "ema": 0.0})
    alone = losses_of(1, recipe, tmp_path / "alone")
    together = losses_of(2, replace(recipe, parallel="fsdp"), tmp_path / "together")
    assert together == pytest.approx(alone, abs=1e-5)
    record = json.loads((tmp_path / "together" / "metrics.jsonl").read_text())
    assert record["val_loss"] == pytest.approx(evaluate(tmp_path / "together")["loss"], abs=1e-5)


def test_shared_weights_killed_at_any_moment_go_on_bit_equal(whole_shared, tmp_path):
    run = tmp_path / "run"
    for death in (("half written", 9), ("time", 0.3), ("renamed", 12)):
        group = launch(2, train_and_die, SHARED, run, 0, death)
        for process in group:
            process.join(timeout=240)
        assert [process.exitcode for process in group] == [-signal.SIGKILL, 2]
    assert not (run / "model.safetensors").exists()
    assert run_all(2, train_or_resume, SHARED, run) == [0, 0]
    shipped, expected = (load_tensors(path / "model.safetensors")[0] for path in (run, whole_shared))
    for name, tensor in expected.items():
        assert torch.equal(shipped[name], tensor), name
    assert len(list((run / "state").iterdir())) == 2  # the last checkpoint's folder and the file that names it


@pytest.mark.parametrize("processes", [1, 4])
def test_another_number_of_processes_reads_shared_weights_to_the_bit(whole_shared, tmp_path, processes, recwarn):
    run = shutil.copytree(whole_shared, tmp_path / "run")
    (run / "model.safetensors").unlink()
    if processes == 1:
        resume(run, QUIET)  # they are whole again
        assert not [warning for warning in recwarn if "torch.distributed" in str(warning.message)]
    else:
        assert run_all(processes, train_or_resume, SHARED, run) == [0] * processes
    shipped, expected = (load_tensors(path / "model.safetensors")[0] for path in (run, whole_shared))
    for name, tensor in expected.items():
        assert torch.equal(shipped[name], tensor), name


def test_a_bit_that_flips_in_a_shared_checkpoint_is_noticed(whole_shared, tmp_path):
    state = shutil.copytree(whole_shared / "state", tmp_path / "state")
    part = max(state.glob("last.*/*.safetensors"))
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(
        InputError, match=r"last\.json is damaged: the files in last\.\d are not those that were written"
    ):
        load_shards(state / "last.safetensors", {}, [])


def test_sides_of_a_model_in_pieces_are_not_asked(tmp_path):
    assert run_all(2, train_or_resume, replace(SHARED, side_loss=0.5), tmp_path / "run") == [2, 2]
    assert "side_loss=0.5 asks the transformer a second time" in said_by(tmp_path / "run")[0]


def test_muon_is_refused_where_matrices_are_in_pieces(tmp_path):
    assert run_all(2, train_or_resume, replace(RECIPE, parallel="fsdp"), tmp_path / "run") == [2, 2]
    assert "optimizer=muon orthogonalises whole matrices, and parallel=fsdp" in said_by(tmp_path / "run")[0]
