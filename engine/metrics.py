"""The numbers of a run as it goes: a line of metrics.jsonl an epoch or episode and, if asked, TensorBoard's scalars."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import write_text, writing
from engine.records import to_json

EVENTS = "events.out.tfevents.*"  # TensorBoard's files


@dataclass
class MetricsLog:
    """metrics.jsonl at `path`; if `writer_class` is given, the same numbers go to TensorBoard files beside it."""

    path: Path
    writer_class: Any = None
    writer: Any = None

    def write(self, step: int, row: dict[str, Any], first: int = 0) -> None:
        """Append the row of an epoch or episode `step`; the row of `first` empties the files.

        TensorBoard shows nothing of an earlier run from the first step that is written here on. Raises UserError when
        it cannot be written.
        """
        row, folder = to_json(row), self.path.parent
        if step == first:
            for old in (self.path, *folder.glob(EVENTS)):
                old.unlink(missing_ok=True)
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if not self.writer_class:
            return
        self.writer = self.writer or self.writer_class(log_dir=str(folder), purge_step=step)
        for name, value in row.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Make the file hold these rows alone, those of the steps that a resumed run has done."""
        write_text(self.path, "".join(json.dumps(to_json(row)) + "\n" for row in rows))


def open_metrics(folder: Path, tensorboard: bool) -> MetricsLog:
    """The log in `folder`; nothing is written yet. Raises UserError when `tensorboard` is not installed."""
    path = folder / "metrics.jsonl"
    if not tensorboard:
        return MetricsLog(path)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard") from error
    return MetricsLog(path, SummaryWriter)
