"""What stages 1 and 2 begin with: the files of the run, what an earlier run left there, the data and the episodes."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.benchmarks import Split
from data.episodes import Episodes, fixed_episodes, sample_episodes
from engine.distributed import Ranks, rank_0_first
from engine.metrics import MetricsLog, open_metrics
from persistence.checkpoints import best_model_path
from persistence.files import TEST_FLAGS, find_state, last_state_path
from persistence.results import result_path


@dataclass(frozen=True)
class RunFiles:
    """Where a run writes its best model, last state, metrics and result; `state` is what it goes on from."""

    best: Path
    last: Path
    metrics: MetricsLog
    table: Path
    state: dict[str, Any] | None


def open_run(stage: str, args: Namespace, ranks: Ranks) -> RunFiles:
    """The files of a run with these flags. Raises UserError as find_state."""
    best = best_model_path(args.checkpoint_dir, args.test_n_way, args.n_shot, args.dataset, args.method, args.backbone)
    last = last_state_path(best)
    metrics = open_metrics(args.results_dir / "logs" / best.stem, args.tensorboard)
    table = result_path(args.results_dir, stage, best, args.dataset, args.novel_dataset)
    trained, kept = (last, best) if args.n_epoch else (None, None)
    with rank_0_first(ranks):
        state = find_state(trained, kept, table, vars(args), TEST_FLAGS, args.resume, args.overwrite)
    return RunFiles(best, last, metrics, table, state)


@dataclass(frozen=True)
class TrainingData:
    """The splits as uint8 arrays, and episodes as indices into them; those of val are the same after every epoch."""

    base: Split
    val: Split
    novel: Split
    val_episodes: Episodes
    novel_episodes: Episodes

    @property
    def made_from(self) -> dict[str, str]:
        """Hashes of the images that training follows from, by name."""
        return {"base images": self.base.fingerprint, "val images": self.val.fingerprint}


def load_data(args: Namespace, load: Callable[..., Split], ranks: Ranks) -> TrainingData:
    """The data of a run with these flags, by load(dataset, split).

    Raises UserError when a split is missing or too small for its episodes.
    """
    protocol = (args.test_n_way, args.n_shot, args.n_query)
    n_test = args.testing_epochs * args.n_episodes
    with rank_0_first(ranks):
        base, val = load(dataset=args.dataset, split="base"), load(dataset=args.dataset, split="val")
        novel = load(dataset=args.novel_dataset, split="novel")
        val_episodes = sample_episodes(val, *protocol, args.val_episodes, args.seed)
        novel_episodes = fixed_episodes(args.episodes_file, novel, *protocol, n_test, args.seed)
    return TrainingData(base, val, novel, val_episodes, novel_episodes)
