"""A run that is killed at any moment and resumed ends bit-equal to one that never stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from children import begin
from killing import Death, deaths, die_by
from runs import assert_same, interrupt_at, records_of, results, tiny_recipe
from tokenfusion.checkpoint import load_tensors
from tokenfusion.errors import InputError
from tokenfusion.recipe import Recipe, load_recipe
from tokenfusion.training import Interrupted, resume, start

RECIPE = tiny_recipe(epochs=3, mixup=0.2, cutmix=1.0, save_minutes=0.0, patience=9)  # a checkpoint after every step


def train_in_child(run: Path, workers: int, death: Death | None) -> None:
    if death:
        die_by(death)
    quiet = Console(quiet=True)
    if (run / "recipe.toml").exists():
        resume(run, quiet)
    else:
        start(tiny_recipe(**{**vars(RECIPE), "workers": workers}), run, quiet)


def child(run: Path, workers: int = 0, death: Death | None = None) -> int:
    """The exit status of a process that trains."""
    process = begin(train_in_child, run, workers, death)
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert child(run) == 0
    return run


def steps_saved(run: Path) -> int:
    """Steps that the checkpoint holds; like all that is there, it is whole."""
    checkpoint = run / "state" / "last.safetensors"
    if (run / "metrics.jsonl").exists():
        records_of(run)
    if (run / "recipe.toml").exists():
        Recipe(**load_recipe(run / "recipe.toml"))
    return load_tensors(checkpoint)[1]["step"] if checkpoint.exists() else 0


@pytest.mark.parametrize("workers", [0, 1])
def test_killed_at_random_moments_inside_writes_too_and_resumed(whole, tmp_path, workers):
    """A run that comes to its end meanwhile is as the whole one, and another is begun."""
    kills, run, step = 0, tmp_path / "run", 0
    for death in deaths(seed=workers, seconds=0.8):
        kills += child(run, workers, death) == -signal.SIGKILL
        before, step = step, steps_saved(run)
        assert step >= before
        if kills == (2 if workers else 8):  # 8: in every kind of write
            break
        if (run / "model.safetensors").exists():
            assert_same(run, whole)
            run, step = run.with_name(f"{run.name} again"), 0
    assert child(run, workers) == 0
    assert_same(run, whole)


def test_every_kind_of_state_is_compared(whole):
    tensors, records, _ = results(whole)
    kinds = {name.split(".")[0] for name in tensors}
    assert kinds == {"model", "ema", "best", "optimizer", "shipped"}
    assert [record["epoch"] for record in records] == [1, 2, 3]


def test_ctrl_c_saves_after_the_step_under_way_and_resumes(whole, tmp_path):
    run, recipe = tmp_path / "run", tiny_recipe(**{**vars(RECIPE), "save_minutes": 99.0})
    with pytest.raises(Interrupted):
        start(recipe, run, Console(quiet=True), listener=interrupt_at(5))
    _, progress = load_tensors(run / "state" / "last.safetensors")
    assert progress["step"] == 5
    resume(run, Console(quiet=True))
    assert_same(run, whole)


def test_adamw_resumes_bit_equal_too(tmp_path):
    """Its fused step adds in the order of memory, so that its moments must come back laid out as the weights are."""
    recipe = tiny_recipe(**{**vars(RECIPE), "optimizer": "adamw", "epochs": 2})
    start(recipe, tmp_path / "whole", Console(quiet=True))
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "state")
    assert child(run, death=("renamed", 7)) == -signal.SIGKILL
    assert 0 < steps_saved(run) < 22
    resume(run, Console(quiet=True))
    assert_same(run, tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(trained):
    before = (trained / "model.safetensors").stat().st_mtime_ns
    resume(trained, Console(quiet=True))
    assert (trained / "model.safetensors").stat().st_mtime_ns == before


def test_changed_data_is_refused(tmp_path, whole):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "model.safetensors").unlink()
    (run / "recipe.toml").write_text(
        (run / "recipe.toml").read_text().replace("val_fraction = 0.2", "val_fraction = 0.3")
    )
    (run / "split.csv").unlink()
    with pytest.raises(InputError, match=r"val_fraction=0\.3 \(it was 0\.2\), .* not those that the run began with"):
        resume(run, Console(quiet=True))


@pytest.mark.parametrize(
    "line",
    [
        "lr = 0.005",
        "head_lr = 2.0",
        'optimizer = "adamw"',
        'model = "vit_micro"',
        'freeze = "cnn"',
        "ema = 0.0",
        "patience = 0",
    ],
)
def test_a_changed_recipe_is_refused(tmp_path, whole, line):
    """Also where what is saved would not fit: other groups of parameters, other moments, other names."""
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "model.safetensors").unlink()
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(changed := re.sub(rf"^{line.split()[0]} = .*$", line, recipe, flags=re.MULTILINE))
    assert changed != recipe
    name = line.split()[0]
    with pytest.raises(InputError, match=rf"{name}=.* \(it was .*\) are not those that the run began with"):
        resume(run, Console(quiet=True))


def test_what_decides_nothing_may_change(tmp_path, whole):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "model.safetensors").unlink()
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace("workers = 0", "workers = 1"))
    resume(run, Console(quiet=True))
    assert_same(run, whole)


def test_a_kill_between_the_last_checkpoint_and_the_metrics_loses_none(tmp_path, whole):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "model.safetensors").unlink()
    (run / "metrics.jsonl").unlink()
    resume(run, Console(quiet=True))
    assert_same(run, whole)


def test_a_run_of_a_newer_version_is_not_resumed(tmp_path, whole):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "model.safetensors").unlink()
    (run / "model.json").write_text(json.dumps(json.loads((run / "model.json").read_text()) | {"format": 99}))
    with pytest.raises(InputError, match="format 99, newer"):
        resume(run, Console(quiet=True))


def test_a_damaged_checkpoint_is_named(tmp_path, whole):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "model.safetensors").unlink()
    checkpoint = run / "state" / "last.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"last\.safetensors is damaged: .*; delete the folder .*state, and --resume"):
        resume(run, Console(quiet=True))
    shutil.rmtree(run / "state")
    resume(run, Console(quiet=True))
    assert_same(run, whole)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 260 kB, which holds one checkpoint of 140 kB but not another beside it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=260k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here: that takes Linux and the rights of root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_really_full_ends_the_run_which_goes_on_once_there_is_room(small_disk, whole):
    run = small_disk / "run"
    with pytest.raises(InputError, match=r"could not be written: .*No space left on device.*--resume"):
        start(RECIPE, run, Console(quiet=True))
    assert steps_saved(run) == 1
    assert [path.name for path in (run / "state").iterdir()] == ["last.safetensors"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    resume(run, Console(quiet=True))
    assert_same(run, whole)


def limit_file_sizes(_run: Path) -> None:
    """The limit is the kernel's: a write beyond it fails as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def forbid_writing(run: Path) -> None:
    """To everybody but root, who may write anyway, and so becomes nobody."""
    for folder in (run, run / "state"):
        folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("harm", [limit_file_sizes, forbid_writing], ids=["full disk", "read-only folder"])
def test_what_cannot_be_written_any_more_keeps_the_last_checkpoint(tmp_path, harm):
    run = tmp_path / "run"
    process = begin(train_and_harm, run, harm)
    process.join()
    assert process.exitcode == 0
    for folder in (run, run / "state"):
        folder.chmod(0o755)
    _, progress = load_tensors(run / "state" / "last.safetensors")
    assert progress["epoch"] == 1
    assert [path.name for path in (run / "state").iterdir()] == ["last.safetensors"]  # and no temporary file
    resume(run, Console(quiet=True))
    assert (run / "model.safetensors").exists()


def train_and_harm(run: Path, harm) -> None:
    def harm_after_an_epoch(update):
        if update.record:
            harm(run)

    try:
        start(tiny_recipe(epochs=2), run, Console(quiet=True), listener=harm_after_an_epoch)
    except InputError as error:
        assert "could not be written" in str(error)  # noqa: PT017 - in a child process
        assert "--resume" in str(error)  # noqa: PT017
        return
    raise AssertionError("training did not notice that it cannot write")
