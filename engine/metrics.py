"""The numbers of a run as it goes: a line of metrics.jsonl an epoch or episode and, if asked, TensorBoard's scalars."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import atomic_file
from engine.records import append_jsonl, to_json

# What TensorBoard's files are called.
EVENTS = "events.out.tfevents.*"


def summary_writer() -> Any:
    """TensorBoard's SummaryWriter class. Raises UserError when that optional package is not installed."""
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard") from error


@dataclass
class MetricsLog:
    """metrics.jsonl at `path`; if `writer_class` is given, the same numbers go to TensorBoard files beside it."""

    path: Path
    writer_class: Any = None
    writer: Any = None

    def write(self, step: int, row: dict[str, Any], first: int = 0) -> None:
        """Append the row of an epoch or episode `step`; the row of `first` empties the files.

        TensorBoard shows nothing of an earlier run from the first step that is written here on. Raises UserError when
        the folder cannot be written.
        """
        if step == first:
            for old in (self.path, *self.path.parent.glob(EVENTS)):
                old.unlink(missing_ok=True)
        append_jsonl(self.path, row)
        if not self.writer_class:
            return
        if self.writer is None:
            self.writer = self.writer_class(log_dir=str(self.path.parent), purge_step=step)
        for name, value in to_json(row).items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Make the file hold these rows alone, those of the steps that a resumed run has done."""
        with atomic_file(self.path) as temporary:
            temporary.write_text("".join(json.dumps(to_json(row)) + "\n" for row in rows), encoding="utf-8")


def open_metrics(folder: Path, tensorboard: bool) -> MetricsLog:
    """The log in `folder`; nothing is written yet. Raises UserError when `tensorboard` is not to be had."""
    return MetricsLog(folder / "metrics.jsonl", summary_writer() if tensorboard else None)
