"""What every rank of tests/scripts/test_distributed.py runs, under torchrun: python -m tests.rank_checks JOB

JOB is a JSON file: {"runs": [[script, flags], ...], "root": folder, "fails": null or [module, function, n, how]}.
The runs follow one another in the same processes. A rank other than the first fails when it writes below the folder.
`fails`: rank 1 meets a UserError, or ends at once, as if killed, when the module calls that function for the n-th time.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch

from data.episodes import EpisodeShape, sample_episodes
from engine.distributed import ALONE, gather_objects, gather_rows, join_ranks
from engine.errors import UserError
from engine.run import Run
from engine.script import run_script
from methods.meta_learners import build_meta_learner
from methods.split_evaluation import evaluate_class_by_class
from models import build_backbone
from persistence import chosen_setting
from tests.helpers import FEW_EPISODES, make_split

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def forbid_writing(root: str) -> None:
    """From here on this process fails when it opens a file below root to write, or makes, moves or removes one."""

    def hook(event: str, args: tuple) -> None:
        if not (args and isinstance(args[0], str | Path) and str(args[0]).startswith(root)):
            return
        exists = os.path.lexists(args[0])
        if (
            (event == "open" and args[2] & WRITING)
            or (event in ("os.remove", "os.rename", "os.rmdir") and exists)
            or (event == "os.mkdir" and not exists)
        ):
            raise AssertionError(f"a rank other than the first writes: {event} {args}")

    sys.addaudithook(hook)


def check_exchange(ranks) -> None:
    """Rows come together in order, also when ranks have none, and whatever their memory format."""
    assert gather_objects(ranks.rank, ranks) == list(range(ranks.n))
    whole = torch.arange(7 * 3 * 4 * 5.0).view(7, 3, 4, 5)
    for form in (torch.contiguous_format, torch.channels_last):
        rows = whole.contiguous(memory_format=form)
        for n in (1, 2, 7):
            mine = ranks.share(range(n))
            got = gather_rows([rows[i : i + 1].contiguous(memory_format=form) for i in mine], ranks)
            assert torch.equal(got, rows[:n]) and got.is_contiguous(memory_format=form)


def check_class_by_class(ranks) -> None:
    """The ranks share out the classes of a split, and all of them have all scores."""
    torch.manual_seed(0)
    split, backbone = make_split((8,) * 5), build_backbone("Conv4", 16, relation=True)
    learner = build_meta_learner("RelationNet", backbone)
    episodes = sample_episodes(split, EpisodeShape(3, 2, 4), 5, 0)
    together, alone = (
        evaluate_class_by_class(learner, backbone, split, episodes, Run(ranks=r)) for r in (ranks, ALONE)
    )
    assert together.counts.sum() == 5 * 3 * 4 and torch.equal(together.counts, alone.counts)


def fail_at(module_name: str, function: str, n: int, how: str) -> None:
    module = importlib.import_module(module_name)
    real, calls = getattr(module, function), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == n and how == "killed":
            os._exit(9)
        if len(calls) == n:
            raise UserError("met by rank 1 alone")
        return real(*args, **kwargs)

    setattr(module, function, counted)


def main() -> None:
    chosen_setting.N_EPISODES = FEW_EPISODES
    job = json.loads(Path(sys.argv[1]).read_text())
    ranks = join_ranks()
    check_exchange(ranks)
    check_class_by_class(ranks)
    if not ranks.first:
        forbid_writing(job["root"])
    if job["fails"] and ranks.rank == 1:
        fail_at(*job["fails"])
    for script, flags in job["runs"]:
        sys.argv = [f"{script}.py", *flags]
        importlib.import_module(script).main()


if __name__ == "__main__":
    run_script(main)
