"""A folder has one writer at a time, whichever verb writes to it."""

import csv
import json
import threading

import pytest

from tokenfusion import evaluate as evaluate_module
from tokenfusion.compare import ensemble
from tokenfusion.errors import InputError
from tokenfusion.evaluate import evaluate
from tokenfusion.files import lock, lock_folder, own_folder, own_results, share_folder
from tokenfusion.report import run as report_module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of noise."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("photos")
    for index in range(8):
        path = root / "01"[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    return root


WRITERS = {
    "check": ("check DATA --out FOLDER", "other"),
    "explain": ("explain RUN IMAGE", "run/explain"),
    "explain --out": ("explain RUN IMAGE --out FOLDER", "other"),
    "analyze collapse": ("analyze collapse RUN --num-images 2", "run/collapse"),
    "analyze tokens": ("analyze tokens RUN --num-images 2 --out FOLDER", "other"),
    "push": ("push RUN lab/name", "run/hub"),
    "train": ("train DATA --out FOLDER --model vit_micro", "other"),
    "export": ("export RUN --format pt2 --out FOLDER", "other"),
}


@pytest.mark.parametrize("verb", WRITERS)
def test_a_verb_writes_nothing_where_another_is_writing(command, run, data, digit, tmp_path, verb):
    words, name = WRITERS[verb]
    folder = tmp_path / name
    places = {"RUN": run, "DATA": data, "FOLDER": folder, "IMAGE": digit}
    held = own_folder(folder) if verb != "export" else lock(tmp_path / f".{folder.name}.lock", folder)
    with held:
        status, _, errors = command(*[places.get(word, word) for word in words.split()])
        assert status == 2
        assert f"{folder}: another process is writing there; wait for its end, or name another folder" in errors
        assert not folder.exists() or [path.name for path in folder.iterdir()] == [".lock"]


def is_locked(path):
    """Whether somebody holds a lock."""
    try:
        with lock(path, path):
            return False
    except InputError:
        return True


def noting(monkeypatch, module, name, notes, path):
    """Note, at each call of a function, whether a lock is held."""
    original = getattr(module, name)

    def call(*words):
        notes.append(is_locked(path))
        return original(*words)

    monkeypatch.setattr(module, name, call)


def test_an_evaluation_and_a_report_write_what_belongs_together_under_one_lock(run, monkeypatch):
    notes, path = [], run / ".results.lock"
    for module, name in ((evaluate_module, "write_csv"), (evaluate_module, "write_json")):
        noting(monkeypatch, module, name, notes, path)
    for name in ("read_results", "write_page"):
        noting(monkeypatch, report_module, name, notes, path)
    evaluate(run)
    report_module.write_report(run)
    assert notes == [True] * 4
    assert not path.exists()


def test_a_mean_of_predictions_is_written_under_a_lock(run, monkeypatch, tmp_path):
    notes, out = [], tmp_path / "mean"
    noting(monkeypatch, ensemble, "write_json", notes, out / ".results.lock")
    ensemble.evaluate_mean([run, run], out)
    assert notes == [True]


def test_two_evaluations_at_once_leave_the_files_of_one(run):
    together = [threading.Thread(target=evaluate, args=(run, None, split)) for split in ("train", "val")]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    with (run / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == json.loads((run / "evaluation.json").read_text())["n"]


def test_results_are_waited_for_and_a_report_of_a_run_under_way_is_not_refused(run, command):
    evaluate(run)
    with lock_folder(run):  # as training has it
        assert command("report", run)[0] == 0
    waits, inside = threading.Event(), threading.Event()

    def second():
        with lock(run / ".results.lock", run, wait=waits.set):
            inside.set()

    with own_results(run):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(10)
        assert not inside.is_set()
    thread.join(10)
    assert inside.is_set()


def test_a_lock_that_is_a_link_is_refused_and_what_it_leads_to_stays_whole(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    for take in (lock_folder, lambda folder: share_folder(folder, "a job")):
        with pytest.raises(InputError, match="cannot be written"), take(tmp_path):
            pass
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("words", ["explain RUN IMAGE", "analyze collapse RUN", "analyze tokens RUN", "export RUN"])
def test_nothing_is_written_into_the_images_that_a_run_was_trained_on(command, run, data, digit, words):
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('data = "digits"', f"data = {json.dumps(str(data))}"))
    places = {"RUN": run, "IMAGE": digit}
    status, _, errors = command(*[places.get(word, word) for word in words.split()], "--out", data / "new")
    assert status == 2
    assert f"{data / 'new'} lies inside the images in {data}" in errors
    assert not (data / "new").exists()
