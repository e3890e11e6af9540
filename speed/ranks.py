"""How stages 1 and 3 grow with processes: the same work by 1, 2 and 4 of them, of one thread each.

python -m speed.ranks

Stage 1 shares out every batch of 64 images, whose gradients it averages; stage 3, in feature space, the episodes.
Seconds are of the clock, from a moment at which all processes are ready until the last has ended: more processes than
cores cannot be much faster.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from data.episodes import EpisodeShape, sample_episodes
from data.transforms import Augmentation, training_images
from engine.distributed import data_parallel, gather_objects, join_ranks, leave_ranks
from engine.run import Run, keep_memory
from engine.script import run_script
from methods.base_training import train_one_epoch
from methods.feature_alignment import align_features, n_together
from reporting.report import markdown_table
from speed.growth import BATCH, HEAD, N_QUERY, SIZE, new_model, random_source, synthetic_split

N_WAY, D, N_BASE = 5, 512, 10_000


def seconds(work: Callable[[], object], run: Run) -> float:
    """Seconds until the last rank has done its work, the second time: the first finds caches cold."""
    for _ in range(2):
        gather_objects(None, run.ranks)
        began = time.perf_counter()
        work()
        gather_objects(None, run.ranks)
    return time.perf_counter() - began


def measure(n_steps: int, n_chunks: int) -> str:
    """The work of this rank: seconds of n_steps training steps, and of n_chunks of episodes aligned together."""
    run = Run(ranks=join_ranks())
    keep_memory()
    images = torch.randint(256, (n_steps * BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    base = training_images(synthetic_split("base", images, 64), Augmentation(), run.device)
    model = new_model("Conv4", 64)
    model.net, model.classifier = data_parallel(model.backbone, run.ranks), data_parallel(model.head, run.ranks)
    training = seconds(lambda: train_one_epoch(model, base, BATCH, 0, run), run)

    related, novel = random_source("base", N_BASE, D, 64), random_source("novel", 2400, D, 20)
    together = n_together(D, N_WAY, HEAD)
    episodes = sample_episodes(novel.split, EpisodeShape(N_WAY, 5, N_QUERY), n_chunks * together, 0)

    def align() -> None:
        for first in run.ranks.share(range(0, len(episodes), together)):
            tasks = [episodes.task(first + i) for i in range(together)]
            align_features(tasks, novel, related, HEAD, run, first)

    alignment = seconds(align, run)
    leave_ranks()
    return f"{training / n_steps} {alignment / len(episodes)}"


def table(n_ranks: list[int], n_steps: int, n_chunks: int) -> str:
    """A row for each number of processes."""
    rows, first = [], [0.0, 0.0]
    for n in n_ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n]
        flags = ["-m", "speed.ranks", "--work", "--n_steps", n_steps, "--n_chunks", n_chunks]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        output = subprocess.check_output([*map(str, command + flags)], text=True, env=environment)
        found = [float(word) for word in output.split()]
        first = first if rows else found
        ratios = [f"{a / b:.2f}x" for a, b in zip(first, found, strict=True)]
        rows.append([str(n), f"{found[0]:.3f}", ratios[0], f"{found[1]:.4f}", ratios[1]])
    return markdown_table(["processes", "s a step of 64", "faster", "s an episode", "faster"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m speed.ranks", description=__doc__.splitlines()[0])
    parser.add_argument("--n_ranks", type=int, nargs="+", default=[1, 2, 4], help="processes, of one thread each")
    parser.add_argument("--n_steps", type=int, default=8, help="training steps of stage 1")
    parser.add_argument("--n_chunks", type=int, default=4, help="chunks of episodes that stage 3 aligns together")
    parser.add_argument("--work", action="store_true", help="be one of the processes")
    args = parser.parse_args()
    if args.work:
        print(measure(args.n_steps, args.n_chunks))
    else:
        print(f"{os.cpu_count()} cores\n\n{table(args.n_ranks, args.n_steps, args.n_chunks)}")


if __name__ == "__main__":
    run_script(main)
