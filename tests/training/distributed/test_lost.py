"""One of several processes is killed or fails where the others wait for it, or memory runs out in the only one."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from group import run_all, said_by, train_or_resume
from runs import tiny_recipe
from tokenfusion.checkpoint import load_tensors
from tokenfusion.launch import read_launch
from tokenfusion.training import prepare, state
from tokenfusion.training.distributed import heartbeat

RECIPE = tiny_recipe(epochs=1)


def test_a_process_is_missed_once_its_count_stands_still(monkeypatch):
    store, now = HashStore(), 100.0
    monkeypatch.setattr(heartbeat, "monotonic", lambda: now)
    pulse, silent = heartbeat.Pulse(store, [0, 1]), []
    for _ in range(60):  # two minutes, of which process 1 lives the first, and process 0 never came
        if now < 160:
            store.add("alive/1", 1)
        silent.append(pulse.silent())
        now += 2
    assert silent[:40] == [None] * 40  # 160 s: it beat last at 158 s
    assert silent[41:] == [1] * 19


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise OSError(5, "Input/output error")


def run_short():
    raise MemoryError


def read_and_harm(rank, harm, run):
    """What befalls process 1 while the data is read; process 0 has read it."""
    heartbeat.BEAT, heartbeat.SILENCE = 0.1, 2.0
    read = prepare.decode_images

    def read_or_not(*arguments):
        if rank == 1:
            harm()
        return read(*arguments)

    prepare.decode_images = read_or_not
    train_or_resume(rank, RECIPE, run)


@pytest.mark.parametrize(
    ("harm", "status", "said"),
    [
        (die, -signal.SIGKILL, "process 1 of 2 has given no sign of life for 2 s: it was killed"),
        (fail, 1, "process 1 of 2 ended: [Errno 5] Input/output error"),
        (run_short, 2, "process 1 of 2 ended: MemoryError"),
    ],
)
def test_what_befalls_one_while_data_is_read_ends_the_other_with_the_reason(tmp_path, harm, status, said):
    assert run_all(2, read_and_harm, harm, tmp_path / "run") == [2, status]
    assert said in said_by(tmp_path / "run")[0]


def train_and_look(rank, run):
    """Note after each checkpoint, as this process sees it, the step of the file that is there."""
    seen, save = [], state.TrainState.save

    def save_and_look(self, path):
        save(self, path)
        seen.append((load_tensors(path)[1]["step"], self.progress.step))

    state.TrainState.save = save_and_look
    train_or_resume(rank, tiny_recipe(epochs=1, save_minutes=0.0), run)
    Path(f"{run}.{rank}.json").write_text(json.dumps(seen))


def test_no_process_goes_on_before_the_checkpoint_is_written(tmp_path):
    """One that ended earlier would let a launcher stop the one that writes."""
    run = tmp_path / "run"
    assert run_all(2, train_and_look, run) == [0, 0]
    seen = json.loads(Path(f"{run}.1.json").read_text())
    assert len(seen) == 12  # 11 steps, and the end of the epoch
    assert all(written == own for written, own in seen)


def train_hungry(rank, run):
    """Memory runs out in the backward pass of more than 64 images."""
    build = prepare.build

    def refuse(gradient):
        if len(gradient) > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def watch_gradient(_module, _inputs, output):
        if output.requires_grad:
            output.register_hook(refuse)

    def build_hungry(*arguments, **named):
        classifier = build(*arguments, **named)
        classifier.model.vit.blocks[0].register_forward_hook(watch_gradient)  # behind most gradients
        return classifier

    prepare.build = build_hungry
    train_or_resume(rank, RECIPE, run)


def test_memory_that_runs_out_in_the_only_process_of_a_launcher_makes_smaller_parts(tmp_path):
    assert run_all(1, train_hungry, tmp_path / "run") == [0]
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert (record["out_of_memory"], record["accumulate"]) == (1, 2)


def test_the_step_of_slurm_says_who_trains_and_not_the_job():
    job = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NODELIST": "gpu[001-004]"}
    assert read_launch(job | {"SLURM_STEP_NODELIST": "gpu[003-004]"}).master == "gpu003"
