"""Where a run keeps its files; continue one that was killed, and never write over one of other flags unasked.

Every stage writes `..._last.tar`, atomically: all that the rest of the run follows from. Random numbers come from the
seed and the number of the epoch or episode, so no generator is part of it, and the final result is the same, bit for
bit, as without an interruption.
"""

import contextlib
import glob
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from engine.distributed import ALONE, Ranks
from engine.errors import UserError
from engine.files import (
    FLAGS,
    Schema,
    folder_name,
    load_tensors,
    matches_schema,
    read_json,
    read_record,
    save_atomically,
)
from engine.lock import hold
from engine.metrics import MetricsLog, open_metrics
from engine.records import to_json
from persistence.checkpoints import REMEDY, load_checkpoint

STATE_FORMAT = "associative-alignment-state/1"
# What every state holds; states of stages 1 and 2; states of stage 3, whose columns have a row per episode.
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
    *("num_workers", "quiet", "device", "no_keep_memory", "cuda_graphs", "preset", "resume", "overwrite"),
    *("tensorboard", "save_episode", "strict_classes"),
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
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (self.dataset, self.novel_dataset, self.backbone):
            folder_name(name)

    def best_model(self, folder: Path) -> Path:
        """The published file name of a best model, with the seed unless it is 0; a dash for the colon of
        torchvision:NAME, which not all systems take."""
        return folder / f"{self.test_n_way}way_{self.n_shot}shot_{self.training}_bestModel.tar"

    @property
    def training(self) -> str:
        """The part of the name that is of any way and shot."""
        seed = f"_seed{self.seed}" if self.seed else ""
        return f"{self.dataset}_{self.method}_{self.backbone.replace(':', '-')}{seed}"

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

    config: all its flags. schema: of its state, None when it only tests. made_from: hashes, by name, of what it follows
    from besides its flags. began: when it would have begun had it never been stopped.
    """

    stage: str
    name: RunName
    folders: Folders
    config: dict[str, Any]
    best: Path
    last: Path
    table: Path
    metrics: MetricsLog
    schema: Schema | None
    state: dict[str, Any] | None = None
    made_from: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.time)
    locks: list[IO[str]] = field(default_factory=list)

    @property
    def episode(self) -> Path:
        """Where stage 3 keeps an episode to be drawn."""
        return self.folders.results_dir / "episodes" / f"{self.table.stem}.pt"

    def trained(self) -> Path:
        """The best model, which stage 3 begins with. Raises UserError when it is missing, and says which would do."""
        if self.best.is_file():
            return self.best
        others = sorted(self.best.parent.glob(f"*way_*shot_{glob.escape(self.name.training)}_bestModel.tar"))
        instead = f"to use the one of another way or shot give --init_from {others[0]}; or " if others else ""
        raise UserError(f"no checkpoint {self.best}: {instead}{REMEDY}")

    def announce(self, what: str, quiet: bool) -> None:
        """Print what the run will do and where its result goes, unless quiet."""
        if not quiet:
            name = self.name
            seed = f", seed {name.seed}" if name.seed else ""
            run = f"{name.method}, {name.backbone}, {name.dataset}{seed}"
            print(f"{self.stage}: {run}: {what}; result: {self.table}")

    def find_state(self, may_differ: set[str], ranks: Ranks = ALONE) -> None:
        """Lock the files; find the state to go on from: with --resume, or of a finished run of the same flags.

        may_differ: flags that --resume may change. Raises UserError when a folder cannot be written, when another run
        is at work on the files, or when one of a run that is unfinished or of other flags would be replaced without
        --overwrite.
        """
        if ranks.first:
            written = [self.table, *([self.last] if self.schema else [])]
            self.locks = [hold(path.with_name(f".{path.name}.lock")) for path in written]
        if self.folders.overwrite:
            return
        if self.schema and self.last.is_file():
            self.state = read_record(self.last, STATE_FORMAT, self.schema, "state", "start again with --overwrite")
        resumed, finished = self.folders.resume and self.state is not None, self.table.is_file()
        earlier: dict[Path, dict[str, Any]] = {}
        if self.state:
            earlier[self.last] = self.state["config"]
        elif self.schema is TRAINING_STATE and self.best.is_file():
            earlier[self.best] = load_checkpoint(self.best).config
        if finished and not resumed:
            record: Any = None
            with contextlib.suppress(OSError, ValueError):
                record = read_json(self.table)
            if not matches_schema(record, {"config": FLAGS}):
                raise UserError(f"{self.table} of an earlier run cannot be read: {ANOTHER_PLACE}")
            earlier[self.table] = record["config"]
        for path, config in earlier.items():
            if differ := differences(self.config, config, may_differ if resumed else set()):
                raise UserError(f"{path} is of a run of other flags, {differ}: give them and --resume, {ANOTHER_PLACE}")
        if resumed or not self.schema:
            return
        if finished and not self.state:
            raise UserError(f"{self.table} is of a finished run without its state {self.last}: {ANOTHER_PLACE}")
        if self.state and not finished:
            raise UserError(f"{self.last} is of an unfinished run: continue it with --resume, or {ANOTHER_PLACE}")
        if self.state:
            print(f"this run has finished: its result is computed again from {self.last}; --overwrite starts again")

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
            raise UserError(f"the {' and the '.join(changed)} have changed since {self.last}: give --overwrite")
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
            raise UserError(f"{self.last} does not fit this run: start again with --overwrite") from error

    @contextlib.contextmanager
    def resumable(self) -> Iterator[None]:
        """Around the loop of a run: the line that an interruption or an error ends it with says where its state is."""
        try:
            yield
        except (KeyboardInterrupt, UserError) as error:
            state = f"--resume goes on from the state {self.last}" if self.last.is_file() else "there is no state yet"
            raise type(error)(f"{str(error) or 'interrupted'}; {state}") from error


def seed_of(path: Path) -> int | None:
    """The seed that a result, a state or a checkpoint was made with, if it is there and says so."""
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        content = read_json(path) if path.suffix == ".json" else load_tensors(path)
        return content["config"].get("seed")
    return None


def written_name(name: RunName, paths: Callable[[RunName], list[Path]]) -> RunName:
    """The name of a run's files; that without the seed where an earlier version has written files of this seed so."""
    older = replace(name, seed=0)
    if not name.seed or any(path.is_file() for path in paths(name)):
        return name
    return older if any(seed_of(path) == name.seed for path in paths(older)) else name


def best_model(name: RunName, folder: Path) -> Path:
    """The checkpoint of a training in a folder."""
    return written_name(name, lambda each: [each.best_model(folder)]).best_model(folder)


def last_state(best: Path) -> Path:
    """The last state of a training, beside its best model."""
    return best.with_name(best.name.replace("_bestModel.tar", "_last.tar"))


def training_files(stage: str, name: RunName, folders: Folders, config: dict[str, Any], trains: bool) -> RunFiles:
    """The files of stage 1 or 2; one that trains writes a model and its state."""

    def paths(name: RunName) -> list[Path]:
        best = name.best_model(folders.checkpoint_dir)
        return [name.table(folders.results_dir, stage), best, last_state(best)]

    name = written_name(name, paths)
    table, best, last = paths(name)
    metrics = open_metrics(folders.results_dir / "logs" / best.stem, folders.tensorboard)
    schema = TRAINING_STATE if trains else None
    return RunFiles(stage, name, folders, config, best, last, table, metrics, schema)


def alignment_files(name: RunName, variant: str, folders: Folders, config: dict[str, Any]) -> RunFiles:
    """The files of stage 3, whose best model is the one that it reads; variant: the alignment, as results name it."""
    stage, best = "associative_alignment", best_model(name, folders.checkpoint_dir)

    def paths(name: RunName) -> list[Path]:
        table = name.table(folders.results_dir, stage, variant)
        return [table, folders.results_dir / "logs" / f"{table.stem}_last.tar"]

    name = written_name(name, paths)
    table, last = paths(name)
    metrics = open_metrics(folders.results_dir / "logs" / table.stem, folders.tensorboard)
    return RunFiles(stage, name, folders, config, best, last, table, metrics, ALIGNMENT_STATE)


def differences(config: dict[str, Any], earlier: dict[str, Any], but: Set[str] = frozenset()) -> str:
    """The flags that differ from an earlier run's, as `--lr 0.1 (was 0.01)`; empty when no relevant one does."""
    now = to_json(config)
    if not now.keys() & earlier.keys():
        return "all of them"
    keys = now.keys() & earlier.keys() - IRRELEVANT - but
    differ = [key for key in now if key in keys and now[key] != earlier[key]]
    return ", ".join(f"--{key} {now[key]} (was {earlier[key]})" for key in differ)
