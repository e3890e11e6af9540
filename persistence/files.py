"""Where a run keeps its files; continue one that was killed, and never write over one of other flags unasked.

Every stage writes `..._last.tar`, atomically: all that the rest of the run follows from. Random numbers come from the
seed and the number of the epoch or episode, so no generator is part of it, and the final result is bit for bit that of
a run that was never interrupted.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import load_tensors, save_atomically
from engine.metrics import MetricsLog, open_metrics
from engine.records import plain
from persistence.checkpoints import load_checkpoint

STATE_FORMAT = "associative-alignment-state/1"
# Flags that change no number, but for the rounding of another device.
IRRELEVANT = {
    *("num_workers", "quiet", "device", "no_keep_memory", "preset", "resume", "overwrite", "n_base_class"),
    *("tensorboard", "save_episode"),
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

    config: all its flags. writes_best, writes_state: whether it writes the first two. made_from: hashes, by name, of
    what it follows from besides its flags. began: when it would have begun had it never been stopped.
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
    writes_state: bool
    state: dict[str, Any] | None = None
    made_from: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.time)

    @property
    def episode(self) -> Path:
        """Where stage 3 keeps an episode to be drawn."""
        return self.folders.results_dir / "episodes" / f"{self.table.stem}.pt"

    def announce(self, what: str, quiet: bool) -> None:
        """Print what the run will do, how long the last of its name took, if that is known, and where its result goes.

        Quiet, it prints nothing.
        """
        took = ""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or damaged
            took = f"; it took {json.loads(self.table.read_text())['seconds'] / 60:.1f} min last time"
        if not quiet:
            name = self.name
            print(f"{self.stage}: {name.method}, {name.backbone}, {name.dataset}: {what}{took}; result: {self.table}")

    def find_state(self, may_differ: set[str]) -> None:
        """Find the state to go on from, if there is one and --resume was given.

        may_differ: flags that need not be those of the state. A run of the same flags that has finished may be run
        again, as it gives the same numbers. Raises UserError when a folder cannot be made, or when starting anew would
        replace a run that is unfinished or of other flags, unless told to overwrite.
        """
        last = self.last if self.writes_state else None
        best = self.best if self.writes_best else None
        make_folders(last, best, self.table)
        if self.folders.resume and last and last.is_file():
            state = read_state(last)
            if differ := differences(self.config, state["config"], but=may_differ):
                raise UserError(
                    f"{last} is of a run of other flags, {differ}: give --resume with the flags of that run, or start "
                    f"anew with --overwrite"
                )
            self.state = state
        elif not self.folders.overwrite:
            refuse_to_replace(last, best, self.table, self.config)

    def begin(self, made_from: dict[str, str]) -> None:
        """Make ready for the first state of the run, or for those after the one found.

        Raises UserError when that one was made from something else.
        """
        self.made_from = made_from
        if self.state is None:
            self.last.unlink(missing_ok=True)  # so that no older state is ever taken for this run's
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
        head = {"format": STATE_FORMAT, "config": plain(self.config), "made_from": self.made_from}
        save_atomically(self.last, head | {"seconds": time.time() - self.began} | content)

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
    return RunFiles(stage, name, folders, config, best, last, table, metrics, writes, writes)


def alignment_files(name: RunName, variant: str, folders: Folders, config: dict[str, Any]) -> RunFiles:
    """The files of stage 3, whose best model is the one that it reads; variant: the alignment, as results name it."""
    stage, best = "associative_alignment", name.best_model(folders.checkpoint_dir)
    table = name.table(folders.results_dir, stage, variant)
    last = folders.results_dir / "logs" / f"{table.stem}_last.tar"
    metrics = open_metrics(folders.results_dir / "logs" / table.stem, folders.tensorboard)
    return RunFiles(stage, name, folders, config, best, last, table, metrics, False, True)


def differences(config: dict[str, Any], earlier: dict[str, Any], but: set[str] | None = None) -> str:
    """The flags that differ from an earlier run's, as `--lr 0.1 (was 0.01)`; empty when no relevant one does."""
    now = plain(config)
    keys = [key for key in now if key in earlier and key not in IRRELEVANT | (but or set())]
    keys = [key for key in keys if now[key] != earlier[key]]
    if not set(now) & set(earlier):
        return "all of them"
    return ", ".join(f"--{key} {now[key]} (was {earlier[key]})" for key in keys)


def read_state(last: Path) -> dict[str, Any]:
    """The content of a file of save_state, running nothing of it. Raises UserError when it is no such file."""
    try:
        state = load_tensors(last, "cpu")
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise ValueError(f"it has no format {STATE_FORMAT!r}")
    except Exception as error:  # a damaged file makes the unpickler raise nearly any exception
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{last} is no state to resume ({reason}): start anew with --overwrite") from error
    return dict(state)


def make_folders(last: Path | None, best: Path | None, table: Path) -> None:
    """Make the folders of these files, and remove from them what a process that was killed while writing has left.

    Raises UserError when a folder cannot be made.
    """
    for path in filter(None, (last, table)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent} cannot be written ({error}): give another folder") from error
    for path in filter(None, (last, best, table)):
        for stale in path.parent.glob(f".{path.name}.*.tmp"):
            stale.unlink(missing_ok=True)


def earlier_configs(last: Path | None, best: Path | None, table: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The flags of the runs that wrote the files which are there. Raises UserError when one cannot be read."""
    if last and last.is_file():
        yield last, read_state(last)["config"]
    try:
        if best and best.is_file() and not (last and last.is_file()):
            yield best, load_checkpoint(best).config
        if table.is_file():
            yield table, dict(json.loads(table.read_text())["config"])
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{best if isinstance(error, UserError) else table} of an earlier run cannot be read: "
            f"replace it with --overwrite, or give another --results_dir and --checkpoint_dir"
        ) from error


def refuse_to_replace(last: Path | None, best: Path | None, table: Path, config: dict[str, Any]) -> None:
    """Raise UserError when these files are of a run of other flags, or of an unfinished one of the same."""
    for path, earlier in earlier_configs(last, best, table):
        if differ := differences(config, earlier):
            raise UserError(
                f"{path} is of a run of other flags, {differ}: continue that run with its flags and --resume, "
                f"replace it with --overwrite, or give another --results_dir and --checkpoint_dir"
            )
    if last and last.is_file() and not table.is_file():
        raise UserError(
            f"{last} is of an unfinished run of the same flags: continue it with --resume, or start anew with "
            f"--overwrite"
        )
