"""What stages 1 and 2 keep of a training: its state after every epoch, the best model, a row of metrics."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from data.benchmarks import Split, median_size
from data.glyphs import VERSION as GLYPHS_VERSION
from engine.distributed import rank_0_first
from engine.errors import UserError
from engine.records import duration, to_json
from engine.run import Run
from methods.evaluation import EpisodeScores
from methods.intervals import mean_and_ci95
from models import Model, n_parameters
from persistence.checkpoints import Checkpoint, load_checkpoint, load_state, save_checkpoint
from persistence.run_files import RunFiles


@dataclass
class TrainState:
    """A model that is trained on a base split, and how far that has come.

    competes: whether the initial model may be the best one. n_done: epochs; best: the highest validation accuracy so
    far, share of 1; rows: of the metrics so far; epoch_began: when the last epoch began; n_total: epochs in all.
    """

    files: RunFiles
    model: Model
    base: Split
    run: Run
    competes: bool = False
    n_done: int = 0
    best: float = -1.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    epoch_began: float = 0.0
    n_total: int = 0

    @contextlib.contextmanager
    def begin(self, val: Split, n_epoch: int) -> Iterator[None]:
        """Around all epochs: restore the state that was found, if any; an interruption says where the state is.

        Raises UserError when the state does not fit this model, these images or this number of epochs.
        """
        files = self.files
        if n_epoch:
            files.begin({"base images": self.base.fingerprint, "val images": val.fingerprint})
        if files.state:
            with files.taking_over() as state:
                self.model.backbone.load_state_dict(state["backbone"])
                self.model.head.load_state_dict(state["head"])
                load_moments(self.model.optimizer, state["optimizer"]["state"])
                self.run.precision.scaler.load_state_dict(state["scaler"])
                self.n_done, self.best, self.rows = state["n_done"], state["best"], state["rows"]
                if len(self.rows) != self.n_done - self.first:
                    raise ValueError("its rows are of other epochs")
            if self.n_done > n_epoch:
                raise UserError(f"{files.last} has done {self.n_done} epochs, more than --n_epoch {n_epoch}: give more")
            if self.run.ranks.first:
                files.metrics.keep(self.rows)
            print(f"resumed after epoch {self.n_done}: {files.last}")
        with files.resumable():
            yield

    @property
    def first(self) -> int:
        """The epoch of the first row: -1 is the model that training begins with, if that competes."""
        return -1 if self.competes else 0

    def epochs(self, n_epoch: int, validate: Callable[[], EpisodeScores]) -> Iterator[int]:
        """The epochs that are still to be done; before all others a model that competes is validated."""
        self.n_total = n_epoch
        for epoch in range(self.n_done or self.first, n_epoch if n_epoch else self.first):
            self.epoch_began = time.time()
            if epoch < 0:
                self.keep_best(epoch, validate())
            else:
                yield epoch

    def end_epoch(self, epoch: int, loss: float, base_accuracy: float, val: EpisodeScores) -> None:
        """Keep the model if it is the best so far, log the epoch and write the state; the first rank does.

        base_accuracy: share of 1. Raises UserError when a file cannot be written; the previous one is then intact.
        """
        self.n_done = epoch + 1
        self.keep_best(epoch, val, loss, base_accuracy)
        if not self.run.ranks.first:
            return
        self.files.save_state(
            n_done=self.n_done,
            best=self.best,
            rows=self.rows,
            backbone=self.model.backbone.state_dict(),
            head=self.model.head.state_dict(),
            optimizer=self.model.optimizer.state_dict(),
            scaler=self.run.precision.scaler.state_dict(),
        )

    def keep_best(
        self, epoch: int, val: EpisodeScores, loss: float = math.nan, base_accuracy: float = math.nan
    ) -> None:
        """Keep the model if it is the best so far, and log the epoch, -1 before training; the first rank does."""
        if not self.run.ranks.first:
            return
        accuracy, ci95 = mean_and_ci95(val.accuracy)
        # A frozen backbone is as good on val after every epoch: the last head is kept.
        if accuracy > self.best or not n_parameters(self.model.backbone):
            self.best = accuracy
            name, backbone = self.files.name, self.model.backbone
            checkpoint = Checkpoint(
                stage=self.files.stage,
                dataset=name.dataset,
                method=name.method,
                backbone=name.backbone,
                img_size=self.base.images.shape[-1],
                class_names=self.base.class_names,
                backbone_state=backbone.state_dict(),
                head_state=self.model.head.state_dict(),
                epoch=epoch,
                val_accuracy=100 * accuracy,
                config=self.files.config,
                normalisation=backbone.normalisation,
                eval_resize=self.base.rule,
                median_size=median_size(self.base),
                glyphs_version=GLYPHS_VERSION,
            )
            save_checkpoint(self.files.best, checkpoint)
        row: dict[str, Any] = {"epoch": epoch, "loss": loss, "base_accuracy": 100 * base_accuracy}
        row |= {"val_accuracy": 100 * accuracy, "val_ci95": 100 * ci95, "seconds": time.time() - self.epoch_began}
        trained = f"epoch {epoch + 1:3d}  loss {loss:.3f}  base accuracy {100 * base_accuracy:.1f}"
        self.rows.append(to_json(row))
        of_epochs = [each["seconds"] for each in self.rows if each["epoch"] >= 0]
        left = (self.n_total - len(of_epochs)) * sum(of_epochs) / max(1, len(of_epochs))
        print(
            f"{trained if epoch >= 0 else 'before training'}  "
            f"val {100 * accuracy:.2f} ± {100 * ci95:.2f}  best {100 * self.best:.2f}  {row['seconds']:.1f} s"
            f"{f', {duration(left)} to go' if left > 0 else ''}"
        )
        self.files.metrics.write(epoch, row, self.first)

    def load_best(self) -> Checkpoint | None:
        """Give the model the weights of its best epoch, if it was trained; returns that checkpoint."""
        with rank_0_first(self.run.ranks):
            if not self.files.schema:
                return None
            checkpoint = load_checkpoint(self.files.best)
            load_state(self.model.backbone, checkpoint.backbone_state, self.files.best)
            load_state(self.model.head, checkpoint.head_state, self.files.best)
            return replace(checkpoint, config=self.files.config)  # of the run that it was kept in, which may go on


def load_moments(optimizer: Optimizer, state: dict[int, dict[str, Tensor]]) -> None:
    """Give an Adam the moments of a state, and keep its learning rates; parameters frozen so far have no moments.

    Raises ValueError when the moments are not of its parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = {i: {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape} for i, p in enumerate(parameters)}
    if any({name: value.shape for name, value in moments.items()} != shapes.get(i) for i, moments in state.items()):
        raise ValueError("the moments are of other parameters")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
