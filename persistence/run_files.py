"""Where a run keeps its files; continue one that was killed, and never write over one of other flags unasked.

Every stage writes `..._last.tar`, atomically: all that the rest of the run follows from. Random numbers come from the
seed and the number of the epoch or episode, so no generator is part of it, and the final result is bit for bit that of
a run that was never interrupted.
"""

import contextlib
import glob
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from engine.distributed import ALONE, Ranks
from engine.errors import UserError
from engine.files import FLAGS, Schema, folder_name, matches_schema, read_json, read_record, save_atomically
from engine.lock import hold
from engine.metrics import MetricsLog, open_metrics
from engine.records import to_json
from persistence.checkpoints import load_checkpoint

STATE_FORMAT = "associative-alignment-state/1"
# What every state holds, those of stages 1 and 2, and that of stage 3, whose columns have a row an episode.
EVERY_STATE: Schema = {"config": FLAGS, "made_from": dict[str, str], "seconds": float}
TRAINING_STATE: Schema = EVERY_STATE | {
    "scaler": dict[str, float],
    **{"n_done": int, "best": float, "backbone": dict[str, Tensor], "head": dict[str, Tensor]},
    "rows": [dict[str, float | None]],
    "optimizer": {"state": dict[int, dict[str, Tensor]]},
}
COLUMNS = ("finetuned", "aligned", "curve", "losses", "n_related", "n_empty", "n_drawn")
ALIGNMENT_STATE: Schema = EVERY_STATE | dict.fromkeys(COLUMNS, Tensor)
ANOTHER_PLACE = "replace it with --overwrite, or give another --results_dir and --checkpoint_dir"
# Flags that change no number, but for the rounding of another device.
IRRELEVANT = {
    *("num_workers", "quiet", "device", "no_keep_memory", "preset", "resume", "overwrite", "n_base_class"),
    *("tensorboard", "save_episode", "rebuild_cache"),
    *("benchmarks_dir", "image_root", "cache_dir", "checkpoint_dir", "results_dir"),
}
# Flags that a training that goes on may change: how long it is, and the test after it.
TEST_FLAGS = {"n_epoch", "n_episodes", "testing_epochs", "episodes_file", "novel_dataset"}
# Flags that an alignment that goes on may change: how many episodes it has.
LENGTH_FLAGS = {"n_episodes", "testing_epochs"}


@dataclass(frozen=True)
class RunName:
    """What a run's files are named after; each field is explained at the flag of the same name."""

    test_n_way: int
    n_shot: int
    dataset: str
    novel_dataset: str
    method: str
    backbone: str

    def __post_init__(self) -> None:
        for name in (self.dataset, self.novel_dataset, self.backbone):
            folder_name(name)

    def best_model(self, folder: Path) -> Path:
        """The published file name of a best model; a dash for the colon of torchvision:NAME, which not all systems
        take."""
        task = f"{self.test_n_way}way_{self.n_shot}shot_{self.dataset}"
        return folder / f"{task}_{self.method}_{self.backbone.replace(':', '-')}_bestModel.tar"

    def table(self, results_dir: Path, stage: str, alignment: str = "") -> Path:
        """Where a result is written: named as the best model, the alignment and another novel benchmark appended."""
        parts = [stage, self.best_model(results_dir).stem.removesuffix("_bestModel"), alignment]
        parts.append(f"to_{self.novel_dataset}" if self.novel_dataset != self.dataset else "")
        return results_dir / "tables" / f"{'_'.join(part for part in parts if part)}.json"


@dataclass(frozen=True)
class Folders:
    """Where files go, and whether they may replace others; each field is explained at the flag of the same name."""

    checkpoint_dir: Path
    results_dir: Path
    tensorboard: bool = False
    resume: bool = False
    overwrite: bool = False


@dataclass
class RunFiles:
    """The files of a run of a stage: best model, last state, metrics, result; and the state that it goes on from.

    config: all its flags. schema: of its state, if it writes one; so does one that writes_best. made_from: hashes, by
    name, of what it follows from besides its flags. began: when it would have begun had it never been stopped.
    """

    stage: str
    name: RunName
    folders: Folders
    config: dict[str, Any]
    best: Path
    last: Path
    table: Path
    metrics: MetricsLog
    writes_best: bool
    schema: Schema | None
    state: dict[str, Any] | None = None
    made_from: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.time)
    locks: list[IO[str]] = field(default_factory=list)

    @property
    def episode(self) -> Path:
        """Where stage 3 keeps an episode to be drawn."""
        return self.folders.results_dir / "episodes" / f"{self.table.stem}.pt"

    def announce(self, what: str, quiet: bool) -> None:
        """Print what the run will do, how long the last of its name took, if that is known, and where its result goes.

        Quiet, it prints nothing.
        """
        took = ""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # none yet, or damaged
            took = f"; it took {read_json(self.table)['seconds'] / 60:.1f} min last time"
        if not quiet:
            name = self.name
            print(f"{self.stage}: {name.method}, {name.backbone}, {name.dataset}: {what}{took}; result: {self.table}")

    def find_state(self, may_differ: set[str], ranks: Ranks = ALONE) -> None:
        """Find the state to go on from: with --resume, and without when a run of the same flags has finished.

        may_differ: flags that need not be those of the state of --resume. Raises UserError when a folder cannot be
        made, when another run is at work on the files, or when starting anew would replace a run that is unfinished or
        of other flags, unless told to overwrite.
        """
        if ranks.first:
            self.take()
        if self.folders.overwrite:
            return
        state = None
        if self.schema and self.last.is_file():
            state = read_record(self.last, STATE_FORMAT, self.schema, "state", "start anew with --overwrite")
        resumed = state if self.folders.resume else None
        for path, earlier in [(self.last, resumed["config"])] if resumed else self.earlier_flags(state):
            if differ := differences(self.config, earlier, but=may_differ if resumed else set()):
                raise UserError(
                    f"{path} is of a run of other flags, {differ}: continue that run with its flags and --resume, "
                    f"{ANOTHER_PLACE}"
                )
        finished = self.schema is not None and self.table.is_file()
        if finished and not state:
            raise UserError(f"{self.table} is of a finished run without its state {self.last}: {ANOTHER_PLACE}")
        if state and not resumed and not finished:
            raise UserError(
                f"{self.last} is of an unfinished run of the same flags: continue it with --resume, or start anew with "
                f"--overwrite"
            )
        if state and not resumed:
            print(f"this run has finished: its result is computed again from {self.last}; --overwrite starts anew")
        self.state = state

    def take(self) -> None:
        """Make the folders, lock the files, and remove from them what a process killed while writing has left.

        Raises UserError when a folder cannot be made, or when another run is at work on the files.
        """
        written = [self.table, *([self.last] if self.schema else []), *([self.best] if self.writes_best else [])]
        for path in written:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{path.parent} cannot be written ({error}): give another folder") from error
        self.locks = [hold(path.with_name(f".{path.name}.lock")) for path in written[:2]]
        for path in (*written, self.metrics.path, self.episode):
            for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                stale.unlink(missing_ok=True)

    def earlier_flags(self, state: dict[str, Any] | None) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The flags of the runs that wrote the files which are there. Raises UserError when one cannot be read."""
        if state:
            yield self.last, state["config"]
        elif self.writes_best and self.best.is_file():
            yield self.best, load_checkpoint(self.best).config
        if self.table.is_file():
            with contextlib.suppress(OSError, ValueError):
                record = read_json(self.table)
                if matches_schema(record, {"config": FLAGS}):
                    yield self.table, record["config"]
                    return
            raise UserError(f"{self.table} of an earlier run cannot be read: {ANOTHER_PLACE}")

    def begin(self, made_from: dict[str, str]) -> None:
        """Make ready for the first state of the run, or for those after the one found.

        Raises UserError when that one was made from something else.
        """
        self.made_from = made_from
        if self.state is None:
            for path in (self.table, self.last):  # so that no older state or result is ever taken for this run's
                path.unlink(missing_ok=True)
            return
        changed = [name for name, digest in made_from.items() if self.state["made_from"].get(name) != digest]
        if changed:
            raise UserError(
                f"{self.last} cannot be resumed: the {' and the '.join(changed)} have changed since: start anew with "
                f"--overwrite"
            )
        self.began -= float(self.state["seconds"])

    def save_state(self, **content: Any) -> None:
        """Write a state atomically: plain values and tensors, and how long the run has taken."""
        head = {"format": STATE_FORMAT, "config": to_json(self.config), "made_from": self.made_from}
        save_atomically(self.last, head | {"seconds": time.time() - self.began} | content)

    @contextlib.contextmanager
    def taking_over(self) -> Iterator[dict[str, Any]]:
        """Around what takes over the state that was found: whatever it raises becomes one line (UserError)."""
        try:
            yield self.state or {}
        except Exception as error:
            raise UserError(f"{self.last} does not fit this run: start anew with --overwrite") from error

    @contextlib.contextmanager
    def resumable(self, save: Callable[[], None] | None = None) -> Iterator[None]:
        """Around the loop of a run: an interruption or an error ends it with a line that says where its state is.

        save: writes the state of what is done when the loop is interrupted between two states.
        """
        last = self.last
        try:
            yield
        except KeyboardInterrupt:
            if save:
                save()
            on = f": the same command with --resume goes on from {last}" if last.is_file() else ", nothing is saved yet"
            raise KeyboardInterrupt(f"interrupted{on}") from None
        except UserError as error:
            good = f"the last good checkpoint is {last}" if last.is_file() else "there is no earlier checkpoint"
            raise UserError(f"{error}; {good}") from error


def training_files(stage: str, name: RunName, folders: Folders, config: dict[str, Any], writes: bool) -> RunFiles:
    """The files of stage 1 or 2; writes: whether it trains, and so writes a model and its state."""
    best = name.best_model(folders.checkpoint_dir)
    last = best.with_name(best.name.replace("_bestModel.tar", "_last.tar"))
    metrics = open_metrics(folders.results_dir / "logs" / best.stem, folders.tensorboard)
    table = name.table(folders.results_dir, stage)
    return RunFiles(
        stage, name, folders, config, best, last, table, metrics, writes, TRAINING_STATE if writes else None
    )


def alignment_files(name: RunName, variant: str, folders: Folders, config: dict[str, Any]) -> RunFiles:
    """The files of stage 3, whose best model is the one that it reads; variant: the alignment, as results name it."""
    stage, best = "associative_alignment", name.best_model(folders.checkpoint_dir)
    table = name.table(folders.results_dir, stage, variant)
    last = folders.results_dir / "logs" / f"{table.stem}_last.tar"
    metrics = open_metrics(folders.results_dir / "logs" / table.stem, folders.tensorboard)
    return RunFiles(stage, name, folders, config, best, last, table, metrics, False, ALIGNMENT_STATE)


def differences(config: dict[str, Any], earlier: dict[str, Any], but: set[str] | None = None) -> str:
    """The flags that differ from an earlier run's, as `--lr 0.1 (was 0.01)`; empty when no relevant one does."""
    now = to_json(config)
    keys = [key for key in now if key in earlier and key not in IRRELEVANT | (but or set())]
    keys = [key for key in keys if now[key] != earlier[key]]
    if not set(now) & set(earlier):
        return "all of them"
    return ", ".join(f"--{key} {now[key]} (was {earlier[key]})" for key in keys)
