"""What is written of a run's epochs, and what is sent to services, which must be installed to be used."""

import csv
import json
import os
import sys
from importlib.util import find_spec

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runs import tiny_recipe
from serving import serving
from tokenfusion import InputError
from tokenfusion.recipe import Recipe
from tokenfusion.training import loggers, resume, start
from tokenfusion.training import run as run_module
from tokenfusion.training.log import Log
from tokenfusion.training.loggers import require_installed

QUIET = Console(quiet=True)
FIRST = {"epoch": 1, "step": 10, "val_top1": 0.25}
SECOND = {"epoch": 2, "step": 20, "val_top1": 0.5, "collapse": 0.125}
THIRD = {"epoch": 3, "step": 30, "val_top1": 0.75}


def rows_of(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_has_a_line_an_epoch_and_new_columns_come_last(tmp_path):
    log = Log(tmp_path, [])
    log.write([FIRST])
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step,val_top1\n1,10,0.25\n"
    log.write([FIRST, SECOND])
    log.close()
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step,val_top1,collapse\n1,10,0.25,\n2,20,0.5,0.125\n"


def test_the_csv_says_what_the_lines_of_json_say(trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    rows = rows_of(trained)
    assert len(rows) == len(records) == 4
    for row, record in zip(rows, records, strict=True):
        assert list(row) == list(record)
        assert {name: float(text) for name, text in row.items() if text} == pytest.approx(
            {name: value for name, value in record.items() if value is not None}
        )


def test_what_a_kill_left_unwritten_is_written(tmp_path):
    """The checkpoint knew of two epochs, the files of none."""
    Log(tmp_path, [FIRST, SECOND]).close()
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["1", "2"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("written", [1, 2])
def test_what_a_kill_left_out_of_tensorboard_is_written_once(tmp_path, written):
    """Killed behind the checkpoint of the second epoch, before or after its record was written."""
    log = Log(tmp_path, [])
    for epochs in range(1, written + 1):
        log.write([FIRST, SECOND][:epochs])
    log.close()
    Log(tmp_path, [FIRST, SECOND]).close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(point.step, point.value) for point in events.Scalars("val_top1")] == [(10, 0.25), (20, 0.5)]


class Flaky:
    """A service that can be down.

    Attributes:
        up: whether it is not.
        sent: steps that it has had.
    """

    up, sent = True, []

    def __init__(self, *_):
        self.answer()

    def answer(self):
        if not Flaky.up:
            raise ConnectionError("503 Service Unavailable\nretry later")

    def send(self, record):
        self.answer()
        Flaky.sent.append(record["step"])

    def close(self, finished):  # noqa: ARG002
        self.answer()


@pytest.fixture
def flaky(monkeypatch):
    """A service that can be down, in the place of one whose package need not be installed."""
    monkeypatch.setitem(loggers.SERVICES, "wandb", Flaky)
    monkeypatch.setattr(loggers, "require_installed", lambda _: None)
    monkeypatch.setattr(run_module, "require_installed", lambda _: None)
    monkeypatch.setattr(Flaky, "up", True)
    monkeypatch.setattr(Flaky, "sent", [])
    return Flaky


def test_a_service_that_was_down_is_sent_what_it_lacks(flaky, tmp_path):
    said, recipe = [], {"loggers": ("wandb",)}
    log = Log(tmp_path, [], recipe, said.append)
    flaky.up = False
    log.write([FIRST])
    log.write([FIRST, SECOND])
    log.close()
    assert (flaky.sent, len(said)) == ([], 1)
    assert said[0].startswith("loggers=wandb fails (503 Service Unavailable): metrics.csv has everything")
    flaky.up = True
    log = Log(tmp_path, [FIRST, SECOND], recipe, said.append)  # as by --resume
    assert flaky.sent == [10, 20]
    log.write([FIRST, SECOND, THIRD])
    assert flaky.sent == [10, 20, 30]


def test_a_finished_run_sends_by_resume_what_a_service_lacks_and_then_no_more(flaky, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(flaky, "send", lambda *_: setattr(flaky, "up", False) or flaky.answer(flaky))
        start(tiny_recipe(loggers=("wandb",)), run, QUIET)
    with pytest.raises(InputError, match="loggers=wandb does not take the run"):
        resume(run, QUIET)
    flaky.up = True
    for _ in range(2):
        resume(run, QUIET)
        assert flaky.sent == [11, 22]
    flaky.up = False
    resume(run, QUIET)  # which asks nothing of the service any more


def test_mlflow_is_asked_three_times_and_not_eight(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    for name in loggers.PATIENCE:
        monkeypatch.setenv(name, "")  # so that what is set by default is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    asked = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=tokenfusion"
    with serving(tmp_path) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        server.failures[asked] = 9
        with pytest.raises(InputError, match="loggers=mlflow does not take the run"):
            Log(tmp_path, [], {"loggers": ("mlflow",)})
    assert server.failures[asked] == 6


def test_what_the_environment_says_of_mlflow_wins(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    Log(tmp_path, [], {"loggers": ("mlflow",)}).close()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


def test_a_run_whose_service_goes_down_still_ships_its_weights(flaky, tmp_path, monkeypatch):
    monkeypatch.setattr(flaky, "send", lambda *_: setattr(flaky, "up", False) or flaky.answer(flaky))
    start(tiny_recipe(loggers=("wandb",)), tmp_path / "run", QUIET)
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]["epochs"] == 0


def test_a_service_that_does_not_take_the_run_is_refused(flaky, tmp_path):
    flaky.up = False
    with pytest.raises(InputError, match=r"loggers=wandb does not take the run \(503 .*leave out --loggers wandb"):
        Log(tmp_path, [], {"loggers": ("wandb",)})


def test_a_service_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="loggers='comet' is not known; choose from: wandb, mlflow"):
        Recipe(loggers=("wandb", "comet"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_whose_package_is_absent_is_refused_with_the_command(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # nothing that is not imported yet is installed
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(InputError, match=rf"loggers={name} needs a package .* pip install '\.\[loggers\]' in a copy"):
        require_installed((name,))


def test_an_absent_package_is_noticed_before_any_image_is_read(tmp_path):
    if find_spec("wandb"):
        pytest.skip("wandb is installed, so that it is not absent")
    with pytest.raises(InputError, match="loggers=wandb needs a package"):
        start(tiny_recipe(loggers=("wandb",)), tmp_path / "run", QUIET)
    assert not (tmp_path / "run" / "split.csv").exists()


def test_mlflow_has_every_epoch_once_also_after_a_resume(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run, recipe = tmp_path / "run", {"loggers": ("mlflow",), "lr": 0.125}
    run.mkdir()
    log = Log(run, [], recipe)
    log.write([FIRST])
    log.close(finished=False)
    Log(run, [FIRST, SECOND], recipe).close(finished=True)
    (sent,) = mlflow.MlflowClient().search_runs(
        [mlflow.MlflowClient().get_experiment_by_name("tokenfusion").experiment_id]
    )
    assert sent.info.status == "FINISHED"
    assert sent.data.params["lr"] == "0.125"
    history = mlflow.MlflowClient().get_metric_history(sent.info.run_id, "val_top1")
    assert [(point.step, point.value) for point in history] == [(10, 0.25), (20, 0.5)]


def test_wandb_keeps_a_run_offline_and_goes_on_with_it(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run, recipe = tmp_path / "run", {"loggers": ("wandb",), "lr": 0.125}
    run.mkdir()
    log = Log(run, [], recipe)
    log.write([FIRST])
    log.close(finished=False)
    Log(run, [FIRST, SECOND], recipe).close(finished=True)
    wandb.teardown()  # as at the end of the process
    state = json.loads((run / "loggers.json").read_text())["wandb"]
    assert state["epochs"] == 2
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert files
    assert {path.stem.removeprefix("run-") for path in files} == {state["run"]}
    held = b"".join(path.read_bytes() for path in files)
    assert held.count(b"val_top1") >= 2
    assert b"collapse" in held
