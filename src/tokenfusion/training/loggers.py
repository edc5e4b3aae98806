"""Services that a run's records are sent to as well, each imported only when it is asked for."""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tokenfusion.errors import InputError, first_line, how_to_install
from tokenfusion.files import write_json
from tokenfusion.training.state import Record

STATE = "loggers.json"
"""Which run of each service a run folder is, how many epochs it was sent, and whether it has all of a finished run."""
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Training waits for a request that fails; 7 times 120 s at each epoch, as MLflow has it, is more than it is worth."""


class Service(Protocol):
    """One run of a service."""

    def send(self, record: Record) -> None:
        """Add an epoch's numbers."""

    def close(self, finished: bool) -> None:
        """Send what is left, and say whether the run is finished or may go on."""


class WandB:
    """A run of Weights & Biases; `WANDB_MODE=offline` keeps it in the run folder until `wandb sync`.

    Args:
        name: unique name of the run: its id.
        run: the run folder.
        recipe: the run's settings.
        resumed: whether the run was begun before.
    """

    def __init__(self, name: str, run: Path, recipe: Mapping[str, Any], resumed: bool) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tokenfusion"),
            id=name,
            name=run.name,
            dir=run,
            config=dict(recipe),
            resume="allow" if resumed else "never",
        )

    def send(self, record: Record) -> None:
        self.run.log(numbers(record), step=int(record["step"]))

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow, where `MLFLOW_TRACKING_URI` says; its experiment is `MLFLOW_EXPERIMENT_NAME` or tokenfusion.

    Args:
        name: unique name of the run: its tag `tokenfusion`.
        run: the run folder.
        recipe: the run's settings.
        resumed: whether the run was begun before.
    """

    def __init__(self, name: str, run: Path, recipe: Mapping[str, Any], resumed: bool) -> None:
        from mlflow import MlflowClient

        for limit, value in PATIENCE.items():
            os.environ.setdefault(limit, value)
        self.client = MlflowClient()
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "tokenfusion")
        found = self.client.get_experiment_by_name(title)
        experiment = found.experiment_id if found else self.client.create_experiment(title)
        known = self.client.search_runs([experiment], f"tags.tokenfusion = '{name}'") if resumed else []
        if known:
            self.id = known[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        self.id = self.client.create_run(experiment, run_name=run.name, tags={"tokenfusion": name}).info.run_id
        for field, value in recipe.items():
            self.client.log_param(self.id, field, value)

    def send(self, record: Record) -> None:
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), int(record["step"])
        self.client.log_batch(self.id, [Metric(key, value, now, step) for key, value in numbers(record).items()])

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


SERVICES: dict[str, type[WandB] | type[MLflow]] = {"wandb": WandB, "mlflow": MLflow}


class Loggers:
    """All the services that a recipe names; a resumed run goes on with theirs.

    One that fails later does not end the training: what it lacks is sent after the next epoch, or by `--resume`.

    Args:
        names: of the services.
        run: the run folder.
        recipe: the run's settings.
        say: how to tell a person that a service fails.

    Raises:
        InputError: a service is not installed, or does not take the run.
    """

    def __init__(
        self, names: Sequence[str], run: Path, recipe: Mapping[str, Any], say: Callable[[str], None] = print
    ) -> None:
        require_installed(names)
        self.say, self.failed = say, set[str]()
        self.path, self.state = run / STATE, read_state(run)
        self.epochs = 0
        self.services: dict[str, Service] = {}
        for name in names:
            resumed = name in self.state
            self.state.setdefault(name, {"run": uuid.uuid4().hex[:12], "epochs": 0})
            try:
                self.services[name] = SERVICES[name](self.state[name]["run"], run, recipe, resumed)
            except Exception as error:  # whatever its client raises
                raise InputError(
                    f"loggers={name} does not take the run ({first_line(error)}); make it reachable, or leave out "
                    f"--loggers {name} (of a run that has begun, in {run / 'recipe.toml'})"
                ) from error
        self.write()

    def send(self, records: Sequence[Record]) -> None:
        """Send the records of epochs that a service has not had."""
        self.epochs = len(records)
        for name, service in self.services.items():
            with self.put_up_with(name):
                for record in records[self.state[name]["epochs"] :]:
                    service.send(record)
                    self.state[name]["epochs"] += 1
        self.write()

    def write(self) -> None:
        if self.state:
            write_json(self.path, self.state)

    def close(self, finished: bool) -> None:
        for name, service in self.services.items():
            with self.put_up_with(name):
                service.close(finished)
                self.state[name]["finished"] = finished and self.state[name]["epochs"] == self.epochs
        self.write()

    @contextmanager
    def put_up_with(self, name: str) -> Iterator[None]:
        """Say once that a service fails, and go on without it."""
        try:
            yield
        except Exception as error:  # whatever its client raises
            if name not in self.failed:
                self.say(
                    f"loggers={name} fails ({first_line(error)}): metrics.csv has everything, and "
                    f"{name} is sent what it lacks after the next epoch or by --resume"
                )
            self.failed.add(name)


def read_state(run: Path) -> dict[str, Any]:
    path = run / STATE
    return json.loads(path.read_text()) if path.exists() else {}


def lacking(names: Sequence[str], run: Path) -> list[str]:
    """The services that do not have all of a finished run."""
    state = read_state(run)
    return [name for name in names if not state.get(name, {}).get("finished")]


def require_installed(names: Sequence[str]) -> None:
    """Refuse a service whose package is absent.

    Raises:
        InputError: with the command that installs it.
    """
    for name in names:
        if find_spec(name) is None:
            raise InputError(
                f"loggers={name} needs a package that is not installed; {how_to_install('loggers')}, or leave it out"
            )


def numbers(record: Record) -> dict[str, float]:
    """What is drawn over the steps."""
    return {name: float(value) for name, value in record.items() if name != "step"}
