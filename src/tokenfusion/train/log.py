"""What a run writes of its epochs: `metrics.jsonl` and TensorBoard events."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenfusion.files import write_text
from tokenfusion.train.state import Record


class Log:
    """The records of a run, on disk.

    Args:
        run: the run folder.
        done: records that are written already; TensorBoard drops what it holds beyond them.
    """

    def __init__(self, run: Path, done: Sequence[Record]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        if done:  # a kill may have come between the checkpoint and this file
            self.write_lines(done)
        self.events = SummaryWriter(str(run / "events"), purge_step=int(done[-1]["step"]) + 1 if done else None)

    def write(self, records: Sequence[Record]) -> None:
        """Write all the records to `metrics.jsonl`, and the last to TensorBoard."""
        self.write_lines(records)
        last = records[-1]
        for name, value in last.items():
            if name not in ("epoch", "step"):
                self.events.add_scalar(name, value, int(last["step"]))
        self.events.flush()

    def write_lines(self, records: Sequence[Record]) -> None:
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))

    def close(self) -> None:
        self.events.close()
