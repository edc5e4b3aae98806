"""Writes are whole or not at all."""

import csv
import json
import multiprocessing
import signal
from pathlib import Path

import pytest
import torch

from tokenfusion.checkpoint import load_tensors, load_weights_exactly, save_tensors
from tokenfusion.errors import InputError
from tokenfusion.files import FolderTaken, lock_folder, refuse_inside, share_folder, write_atomic, write_csv, write_json


def test_a_write_that_fails_leaves_the_old_bytes_and_no_rubbish(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half of the ne")
        raise OSError("disk full")

    with pytest.raises(InputError, match=r"could not be written: disk full; what was there before is intact"):
        write_atomic(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def die_while_writing(path: Path) -> None:
    def write(temporary):
        temporary.write_text("half")
        signal.raise_signal(signal.SIGKILL)

    write_atomic(path, write)


def test_a_kill_while_writing_leaves_the_old_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    process = multiprocessing.get_context("forkserver").Process(target=die_while_writing, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_any_text_comes_back_from_a_csv(tmp_path):
    rows = [["a,b", 'c"d', "two\nlines"], ["old\rMac", "Größe", ""], ["win\r\ndows", " ", "|"]]
    write_csv(tmp_path / "a.csv", ("one", "two", "three"), rows)
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["one", "two", "three"], *rows]


def test_json_is_utf8_and_readable(tmp_path):
    write_json(tmp_path / "a.json", {"Größe": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"Größe": [1, 2]}
    assert "Größe" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_tensors_and_their_description_come_back_to_the_bit(tmp_path):
    tensors = {
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(7),
    }
    save_tensors(tmp_path / "t", tensors, {"step": 3, "loss": 0.1 + 0.2})
    loaded, description = load_tensors(tmp_path / "t")
    assert description == {"step": 3, "loss": 0.1 + 0.2}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype


def test_weights_may_be_read_by_whoever_may_read_a_runs_other_files(tmp_path):
    write_json(tmp_path / "a.json", {})
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.json").stat().st_mode


@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_damaged_tensors_are_refused(tmp_path, damage):
    path = tmp_path / "t"
    save_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-10] if damage is None else damage)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_tensors(path)


def test_weights_that_are_not_finite_leave_the_model_as_it_was(tmp_path):
    model = torch.nn.Linear(3, 2)
    before = model.weight.clone()
    tensors = {"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, torch.nan])}
    with pytest.raises(InputError, match="bias is not finite"):
        load_weights_exactly(model, tensors, tmp_path)
    assert torch.equal(model.weight, before)


def test_weights_that_do_not_fit_leave_the_model_as_it_was(tmp_path):
    model = torch.nn.Linear(3, 2)
    before = model.weight.clone()
    for tensors, said in (
        ({"weight": torch.ones(2, 3)}, "bias is missing"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "extra": torch.ones(1)}, "extra is unknown"),
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, r"weight has shape \(2, 4\), not \(2, 3\)"),
    ):
        with pytest.raises(InputError, match=said):
            load_weights_exactly(model, tensors, tmp_path)
        assert torch.equal(model.weight, before)


def test_a_folder_has_one_writer_at_a_time_and_is_left_without_a_trace(tmp_path):
    with lock_folder(tmp_path):
        with pytest.raises(InputError, match="another process is writing there; wait"), lock_folder(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    with lock_folder(tmp_path):
        pass


def die_with_the_lock(path: Path) -> None:
    with lock_folder(path):
        signal.raise_signal(signal.SIGKILL)


def test_a_lock_ends_with_the_process_that_held_it(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=die_with_the_lock, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / ".lock").exists()
    with lock_folder(tmp_path):
        pass


def test_the_processes_of_one_job_share_a_folder_and_the_last_leaves_no_trace(tmp_path):
    with share_folder(tmp_path, "job 1"):
        with share_folder(tmp_path, "job 1"):
            for other in (share_folder(tmp_path, "job 2", grace=0), lock_folder(tmp_path)):
                with pytest.raises(FolderTaken, match="another process is writing there; wait"), other:
                    pass
        with share_folder(tmp_path, "job 1"):
            pass
    assert list(tmp_path.iterdir()) == []
    with lock_folder(tmp_path), pytest.raises(FolderTaken), share_folder(tmp_path, "job 1", grace=0):
        pass


def test_what_a_killed_job_left_in_the_lock_is_no_hindrance(tmp_path):
    (tmp_path / ".lock").write_text("a job that was killed")
    with share_folder(tmp_path, "job 2"):
        assert (tmp_path / ".lock").read_text() == "job 2"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["photos", "photos/run", "photos/a/../b", "elsewhere/to-photos/run"])
def test_a_folder_inside_the_images_is_refused(tmp_path, inside):
    (tmp_path / "photos").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "to-photos").symlink_to(tmp_path / "photos")
    with pytest.raises(InputError, match=r"lies inside the images .* --out "):
        refuse_inside(tmp_path / inside, str(tmp_path / "photos"))
    refuse_inside(tmp_path / "photos-run", str(tmp_path / "photos"))
    refuse_inside(tmp_path / "digits" / "run", "digits")
