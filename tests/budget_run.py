"""Estimated against measured peaks of memory: python -m tests.budget_run makes a table of some settings of each stage.

Words after that choose the settings that hold one of them.
"""

import multiprocessing
import os
import resource
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import methods.budget
from tests.helpers import call, folders, make_benchmark

ALL = ["--seed", 0, "--quiet", "--num_workers", 1, "--overwrite"]
FEW = [*ALL, "--dataset", "tiny", "--test_n_way", 5, "--n_query", 15, "--img_size", 84]
TRAIN = [
    "transferLearning",
    *FEW,
    "--ft_n_epoch",
    10,
    "--n_epoch",
    1,
    "--val_episodes",
    40,
    "--n_episodes",
    40,
    "--batch_size",
]
META = ["metaLearning", *FEW, "--n_epoch", 1, "--val_episodes", 20, "--n_episodes", 20]
META += ["--episodes_per_epoch", 2, "--method"]
ALIGN = ["associative_alignment", *FEW, "--ft_n_epoch", 10, "--n_episodes", 4, "--align_iters", 3, "--aug_size", 30]
FEATURES = [*ALIGN, "--align_blocks", 0]
MODELS = "ROOT/results/models/5way_5shot_tiny_arcMax"
MODEL = f"{MODELS}_Conv4_bestModel.tar"
# What starts from a model takes one of the first stage.
SETTINGS: dict[str, list[object]] = {
    "1: Conv4, 32 px, 16": [*TRAIN, 16, "--img_size", 32],
    "1: Conv4, 256": [*TRAIN, 256, "--data_aug", False],
    "1: Conv4, 256, augmented": [*TRAIN, 256],
    "1: Conv4, 256, last block": [*TRAIN, 256, "--train_blocks", 1, "--init_from", MODEL],
    "1: Conv4, frozen": [*TRAIN, 256, "--freeze", "--init_from", MODEL],
    "1: ResNet12, 32": [*TRAIN, 32, "--backbone", "ResNet12"],
    "1: ResNet18, 64": [*TRAIN, 64, "--backbone", "ResNet18"],
    "1: WideResNet, 40 px, 8": [*TRAIN, 8, "--backbone", "WideResNet", "--img_size", 40],
    "2: ProtoNet": [*META, "ProtoNet", "--train_n_query", 30],
    "2: ProtoNet, ResNet12": [*META, "ProtoNet", "--backbone", "ResNet12", "--n_shot", 1, "--train_n_query", 5],
    "2: MatchingNet": [*META, "MatchingNet"],
    "2: RelationNet": [*META, "RelationNet"],
    "2: RelationNet, 32 px": [*META, "RelationNet_softmax", "--img_size", 32],
    "3: all blocks": ALIGN,
    "3: all blocks, adversarial": [*ALIGN, "--alignment", "adversarial"],
    "3: last block": [*ALIGN, "--align_blocks", 1],
    "3: features": FEATURES,
    "3: features, adapter": [*FEATURES, "--alignment", "centroid", "--align_adapter", "full"],
    "3: auto": ["associative_alignment", *FEW, "--ft_n_epoch", 10, "--n_episodes", 4, "--align_preset", "auto"],
}


def run_one(script: str, flags: list[str]) -> tuple[float, float, float]:
    """A script in this process: what was there, the largest estimate on top of that, and the peak, in MB."""
    there, estimates = [], []

    def note(what: str, n_bytes: int, remedy: str, device: object) -> None:
        there.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        estimates.append(n_bytes)

    methods.budget.check_memory = note
    outcome = call(script, *flags)
    assert outcome.status == 0, outcome.err
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return there[0] / 1e6, (there[0] + max(estimates)) / 1e6, peak / 1e6


def measure(root: Path, cache: Path, script: str, *flags: object) -> tuple[float, float, float]:
    """The same in a new process, for a forked one would not have touched the libraries yet."""
    given = map(str, [*folders(root), *flags, "--cache_dir", cache])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_one, script, [flag.replace("ROOT", str(root)) for flag in given]).result()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_benchmark(root / "benchmarks" / "tiny", n_images=60, side=84)
        make_benchmark(root / "user", n_class=(6, 6, 5), n_images=5, side=84, seed=1)
        for setting, command in SETTINGS.items():
            if sys.argv[1:] and not any(word in setting for word in sys.argv[1:]):
                continue
            # Nothing is cached from one setting to the next.
            here, estimate, peak = measure(root, root / f"cache of {setting}", *command)
            of_both, of_added = estimate / peak, (estimate - here) / (peak - here)
            figures = f"there {here:5.0f}  estimated {estimate:5.0f}  measured {peak:5.0f} MB"
            print(f"{setting:<34} {figures}  ratio {of_both:.2f}, of what was added {of_added:.2f}", flush=True)


if __name__ == "__main__":
    main()
