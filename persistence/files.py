"""Continue a run that was killed, and never write over one of other flags unasked.

Every stage writes `..._last.tar`, atomically: all that the rest of the run follows from. Random numbers come from the
seed and the number of the epoch or episode, so no generator is part of it, and the final result is bit for bit that of
a run that was never interrupted.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.files import atomic_file, load_tensors, save_atomically
from engine.precision import Precision
from engine.records import plain
from methods.alignment import AlignedEpisode
from methods.confusion import count_predictions
from methods.evaluation import EpisodeScores, share_right
from persistence.checkpoints import Checkpoint, load_checkpoint, save_checkpoint

STATE_FORMAT = "associative-alignment-state/1"
# Flags that change no number, but for the rounding of another device.
IRRELEVANT = {
    *("num_workers", "quiet", "device", "no_keep_memory", "preset", "resume", "overwrite", "n_base_class"),
    *("tensorboard", "save_episode"),
    *("benchmarks_dir", "image_root", "cache_dir", "checkpoint_dir", "results_dir"),
}
# Flags that a training that goes on may change: how long it is, and the test after it.
TEST_FLAGS = {"n_epoch", "n_episodes", "testing_epochs", "episodes_file", "novel_dataset"}
# The same of stage 3.
LENGTH_FLAGS = {"n_episodes", "testing_epochs"}
# What stage 3 keeps of each episode.
COLUMNS = ("finetuned", "aligned", "curve", "losses", "n_related", "n_empty", "n_drawn")


def last_state_path(best: Path) -> Path:
    """Where the last state of a training is written, beside its best model."""
    return best.with_name(best.name.replace("_bestModel.tar", "_last.tar"))


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


def find_state(
    last: Path | None,
    best: Path | None,
    table: Path,
    config: dict[str, Any],
    may_differ: set[str],
    resume: bool,
    overwrite: bool,
) -> dict[str, Any] | None:
    """The state to resume from, or None to start anew.

    last, best, table: where this run writes its last state and best model (None if it writes none) and its result.
    may_differ: flags that need not be those of the state. A run of the same flags that has finished may be run again,
    as it gives the same numbers. Raises UserError when a folder cannot be made, or when starting anew would replace
    a run that is unfinished or of other flags, unless told to overwrite.
    """
    for path in filter(None, (last, table)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent} cannot be written ({error}): give another folder") from error
    for path in filter(None, (last, best, table)):
        for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed while writing
            stale.unlink(missing_ok=True)
    if resume and last and last.is_file():
        state = read_state(last)
        if differ := differences(config, state["config"], but=may_differ):
            raise UserError(
                f"{last} is of a run of other flags, {differ}: give --resume with the flags of that run, or start anew "
                f"with --overwrite"
            )
        return state
    if not overwrite:
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
    return None


def save_state(last: Path, config: dict[str, Any], made_from: dict[str, str], began: float, **content: Any) -> None:
    """Write a state atomically: plain values and tensors, and how long the run, which began at `began`, has taken."""
    head = {"format": STATE_FORMAT, "config": plain(config), "made_from": made_from, "seconds": time.time() - began}
    save_atomically(last, head | content)


def begin(state: dict[str, Any] | None, made_from: dict[str, str], last: Path) -> float:
    """Make ready for the first state of a run, or for those after `state`; returns the seconds taken so far.

    made_from: hashes, by name, of what the run follows from besides its flags. Raises UserError when one of them is
    not what `state` was made from.
    """
    if state is None:
        last.unlink(missing_ok=True)  # so that no older state is ever taken for this run's
        return 0.0
    changed = [name for name, digest in made_from.items() if state["made_from"].get(name) != digest]
    if changed:
        raise UserError(
            f"{last} cannot be resumed: the {' and the '.join(changed)} have changed since: start anew with --overwrite"
        )
    return float(state["seconds"])


@contextlib.contextmanager
def resumable(last: Path, save: Callable[[], None] | None = None) -> Iterator[None]:
    """Around the loop of a run: an interruption or an error ends it with a line that says where its state is.

    save: writes the state of what is done when the loop is interrupted between two states.
    """
    try:
        yield
    except KeyboardInterrupt:
        if save:
            save()
        told = f": the same command with --resume goes on from {last}" if last.is_file() else ", nothing is saved yet"
        raise KeyboardInterrupt(f"interrupted{told}") from None
    except UserError as error:
        good = f"the last good checkpoint is {last}" if last.is_file() else "there is no earlier checkpoint"
        raise UserError(f"{error}; {good}") from error


@dataclass
class Training:
    """What stages 1 and 2 train: all that changes from epoch to epoch."""

    backbone: nn.Module
    head: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    n_done: int = 0  # epochs
    best: float = -1.0  # highest validation accuracy so far, share of 1

    def keep_best(
        self, path: Path, stage: str, val_accuracy: float, epoch: int, class_names: list[str], config: dict[str, Any]
    ) -> None:
        """Save the model as the best one when its validation accuracy, a share of 1, is the highest so far."""
        if val_accuracy > self.best:
            self.best = val_accuracy
            checkpoint = Checkpoint(
                stage=stage,
                dataset=config["dataset"],
                method=config["method"],
                backbone=config["backbone"],
                img_size=config["img_size"],
                class_names=class_names,
                backbone_state=self.backbone.state_dict(),
                head_state=self.head.state_dict(),
                epoch=epoch,
                val_accuracy=100 * val_accuracy,
                config=config,
            )
            save_checkpoint(path, checkpoint)

    def save(self, last: Path, config: dict[str, Any], made_from: dict[str, str], began: float) -> None:
        """Write the state. Raises UserError when it cannot be written; the previous one is then intact."""
        save_state(
            *(last, config, made_from, began),
            n_done=self.n_done,
            best=self.best,
            backbone=self.backbone.state_dict(),
            head=self.head.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.precision.scaler.state_dict(),
        )

    def restore(self, state: dict[str, Any], n_epoch: int, metrics: Path | None, last: Path) -> None:
        """Go on from a state; rows of the metrics file, if given, that came after it go.

        Raises UserError if it does not fit.
        """
        if state["n_done"] > n_epoch:
            raise UserError(
                f"{last} has done {state['n_done']} epochs, more than --n_epoch {n_epoch}: give at least that"
            )
        try:
            self.backbone.load_state_dict(state["backbone"])
            self.head.load_state_dict(state["head"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.precision.scaler.load_state_dict(state["scaler"])
            self.n_done, self.best = int(state["n_done"]), float(state["best"])
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{last} does not fit this run: start anew with --overwrite") from error
        if metrics and metrics.is_file():
            rows = metrics.read_text().splitlines(keepends=True)[: self.n_done]
            with atomic_file(metrics) as temporary:
                temporary.write_text("".join(rows))
        print(f"resumed after epoch {self.n_done - 1}: {last}")


@dataclass
class AlignedEpisodes:
    """What stage 3 has of the episodes done, a row each: the columns of `tensors`."""

    precision: Precision
    rows: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, episode: AlignedEpisode) -> None:
        """Append what the report and the metrics need of an episode."""
        finetuned, aligned, *curve = (
            count_predictions(scores, scores.shape[1]).cpu()
            for scores in (episode.finetuned, episode.aligned, *episode.curve)
        )
        n_related = torch.tensor([len(samples) for samples in episode.related.samples])
        self.rows.append(
            {
                "finetuned": finetuned,
                "aligned": aligned,
                "curve": torch.stack([share_right(counts).mean() for counts in (finetuned, *curve)]),
                "losses": torch.tensor(episode.losses[-1] if episode.losses else (math.nan,) * 3),
                "n_related": n_related.sum(),
                "n_empty": (n_related == 0).sum(),
                "n_drawn": torch.tensor(episode.n_drawn),
            }
        )

    def metrics_row(self, i: int) -> dict[str, Any]:
        """Episode i in numbers: accuracy (%), losses of the last iteration, related base images and drawn of them."""
        row = self.rows[i]
        before, after = (EpisodeScores(row[name].unsqueeze(0)).accuracy.item() for name in ("finetuned", "aligned"))
        losses = zip(("align_loss", "related_loss", "support_loss"), row["losses"].tolist(), strict=True)
        counts = {name: int(row[name]) for name in ("n_related", "n_empty", "n_drawn")}
        return {"episode": i, "fine_tuning": 100 * before, "alignment": 100 * after, **dict(losses), **counts}

    def means(self) -> tuple[float, float]:
        """Mean accuracy (%) so far, of fine-tuning and after alignment."""
        finetuned, aligned = (torch.stack([row[name] for row in self.rows]) for name in ("finetuned", "aligned"))
        return 100 * share_right(finetuned).mean().item(), 100 * share_right(aligned).mean().item()

    def tensors(self) -> dict[str, Tensor]:
        """finetuned and aligned (E, n_way, n_way): queries by true and predicted class; curve (E, k): accuracy at
        iterations; losses (E, 3) of the last one; n_related, n_empty and n_drawn (E,)."""
        return {name: torch.stack([row[name] for row in self.rows]) for name in self.rows[0]}

    def save(self, last: Path, config: dict[str, Any], made_from: dict[str, str], began: float) -> None:
        """Write the state, if any episode is done."""
        if self.rows:
            save_state(last, config, made_from, began, scaler=self.precision.scaler.state_dict(), **self.tensors())

    def restore(self, state: dict[str, Any], n_test: int, last: Path) -> None:
        """Go on after the episodes of a state, n_test of them at most. Raises UserError if it does not fit."""
        try:
            columns = [state[name][:n_test] for name in COLUMNS]
            self.rows = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]
            self.precision.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{last} does not fit this run: start anew with --overwrite") from error
        print(f"resumed after {len(self.rows)} episodes: {last}")


def weights_digest(module: nn.Module) -> str:
    """A hash of all weights and statistics of a module."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
