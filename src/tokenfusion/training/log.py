"""What a run writes of its epochs: `metrics.jsonl`, `metrics.csv`, TensorBoard events, and what it sends elsewhere."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenfusion.files import write_csv, write_text
from tokenfusion.history import HISTORY, read_history
from tokenfusion.training.loggers import Loggers, lacking
from tokenfusion.training.state import Record


class Log:
    """The records of a run, on disk and where its recipe's `loggers` say.

    Args:
        run: the run folder.
        done: records of the epochs that a checkpoint holds; TensorBoard drops what it has from the last of them on.
        recipe: the run's settings, for the services.
        say: how to tell a person that a service fails.
        before: records of the run's stages that are done, which those of this one follow.

    Raises:
        InputError: a service cannot be used.
    """

    def __init__(
        self,
        run: Path,
        done: Sequence[Record],
        recipe: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
        before: Sequence[Record] = (),
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        recipe = recipe or {}
        self.before = before
        done = self.following(done)
        self.path = run / HISTORY
        self.events = SummaryWriter(str(run / "events"), purge_step=int(done[-1]["step"]) if done else None)
        self.loggers = Loggers(recipe.get("loggers", ()), run, recipe, say)
        if done:  # a kill may have come between the checkpoint and this
            self.write_all(done)

    def write(self, records: Sequence[Record]) -> None:
        """Write all the records to the files, and the last to TensorBoard; send those that are new."""
        self.write_all(self.following(records))

    def following(self, records: Sequence[Record]) -> Sequence[Record]:
        """The records of the stages before, and these, whose epochs and steps are counted on from there."""
        if not self.before:
            return records
        last = self.before[-1]
        own = [record | {name: last[name] + record[name] for name in ("epoch", "step")} for record in records]
        return [*self.before, *own]

    def write_all(self, records: Sequence[Record]) -> None:
        self.write_files(records)
        last = records[-1]
        for name, value in last.items():
            if name not in ("epoch", "step"):
                self.events.add_scalar(name, value, int(last["step"]))
        self.events.flush()
        self.loggers.send(records)

    def write_files(self, records: Sequence[Record]) -> None:
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
        columns = list(dict.fromkeys(name for record in records for name in record))  # new ones come last
        rows = ([record.get(name, "") for name in columns] for record in records)
        write_csv(self.path.with_suffix(".csv"), columns, rows)

    def close(self, finished: bool = True) -> None:
        self.events.close()
        self.loggers.close(finished)


def send_rest(run: Path, recipe: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Send the records of a finished run to the services that lack some of them.

    Raises:
        InputError: a service cannot be used.
    """
    if names := lacking(recipe["loggers"], run):
        loggers = Loggers(names, run, recipe, say)
        loggers.send(read_history(run))
        loggers.close(finished=True)
