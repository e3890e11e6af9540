"""Estimated against measured peaks of memory: python -m tests.budget_run makes a table of some settings of each stage.

Words after that choose the settings that hold one of them.
"""

import importlib
import multiprocessing
import os
import resource
import sys
import tempfile
from pathlib import Path

import methods.budget
from tests.helpers import call, folders, make_benchmark

FEW = ["--dataset", "tiny", "--seed", 0, "--test_n_way", 5, "--n_query", 15, "--quiet", "--num_workers", 1]
TRAIN = [*FEW, "--n_epoch", 1, "--val_episodes", 40, "--n_episodes", 40, "--overwrite", "--ft_n_epoch", 10]
META = [*FEW, "--n_epoch", 1, "--val_episodes", 20, "--n_episodes", 20, "--overwrite", "--episodes_per_epoch", 2]
ALIGN = [*FEW, "--n_episodes", 4, "--align_iters", 3, "--ft_n_epoch", 10, "--overwrite"]
TRAIN_84 = ["transferLearning", *TRAIN, "--img_size", 84]
META_84 = ["metaLearning", *META, "--img_size", 84, "--method"]
ALIGN_84 = ["associative_alignment", *ALIGN, "--img_size", 84]
FEATURES = [*ALIGN_84, "--align_blocks", 0, "--aug_size", 30]
# The third stage takes the model of the last Conv4 of the first.
SETTINGS: dict[str, list[object]] = {
    "1: Conv4, 32 px, 16": ["transferLearning", *TRAIN, "--img_size", 32, "--batch_size", 16],
    "1: Conv4, 256": [*TRAIN_84, "--batch_size", 256, "--data_aug", False],
    "1: Conv4, 256, augmented": [*TRAIN_84, "--batch_size", 256],
    "1: ResNet12, 32": [*TRAIN_84, "--backbone", "ResNet12", "--batch_size", 32],
    "2: ProtoNet": [*META_84, "ProtoNet", "--train_n_query", 30],
    "2: MatchingNet": [*META_84, "MatchingNet"],
    "2: RelationNet": [*META_84, "RelationNet"],
    "2: RelationNet, 32 px": ["metaLearning", *META, "--img_size", 32, "--method", "RelationNet_softmax"],
    "3: all blocks": [*ALIGN_84, "--aug_size", 30],
    "3: all blocks, adversarial": [*ALIGN_84, "--alignment", "adversarial"],
    "3: last block": [*ALIGN_84, "--align_blocks", 1],
    "3: features": FEATURES,
    "3: features, adapter": [*FEATURES, "--alignment", "centroid", "--align_adapter", "full"],
}


def run_one(script: str, flags: list[str]) -> tuple[float, float, float]:
    """A script in this process: what was there, the estimate, that included, and the peak, in MB."""
    estimates = []

    def note(what: str, n_bytes: int, remedy: str) -> None:
        here = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        estimates.append((here / 1e6, (here + n_bytes) / 1e6))

    methods.budget.check_memory = note
    outcome = call(script, *flags)
    assert outcome.status == 0, outcome.err
    return *estimates[-1], 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(root: Path, script: str, *flags: object) -> tuple[float, float, float]:
    """The same in a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(run_one, (script, [*map(str, folders(root)), *map(str, flags)]))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_benchmark(root / "benchmarks" / "tiny", n_images=60, side=84)
        for setting, command in SETTINGS.items():
            if sys.argv[1:] and not any(word in setting for word in sys.argv[1:]):
                continue
            cache = root / f"cache of {setting}"  # nothing is cached from one setting to the next
            here, estimate, peak = measure(root, *command, "--cache_dir", cache)
            of_both, of_added = estimate / peak, (estimate - here) / (peak - here)
            figures = f"there {here:5.0f}  estimated {estimate:5.0f}  measured {peak:5.0f} MB"
            print(f"{setting:<34} {figures}  ratio {of_both:.2f}, of what was added {of_added:.2f}", flush=True)


if __name__ == "__main__":
    for script in ("transferLearning", "metaLearning", "associative_alignment"):
        importlib.import_module(script)
    main()
