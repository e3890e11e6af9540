"""How long a command takes before it begins: each script's --help, and predict.py with a classifier on 20 images.

The reference is `import torch`, which every script needs. Commands and imports take turns, in processes of their own,
once before they are timed.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engine.records import REPOSITORY
from persistence.checkpoints import Checkpoint, create_backbone, save_checkpoint
from speed.bench_data import link, write_jpegs
from speed.common import Row, Setting, row

SCRIPTS = ("transferLearning", "metaLearning", "associative_alignment", "predict", "reproduce")
HELP, LABELLING = 1 / 1.35, 1 / 1.8  # the least ratios
Command = list[str | Path]


def seconds_of(command: Command) -> float:
    """Seconds of a run of Python, which must end well."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def labelling(folder: Path) -> Command:
    """The command that labels 20 images with a classifier of a Conv4 of random weights, which it makes first."""
    images = write_jpegs(folder / "files", 45)
    link(folder / "support", 25, "abcde", images)
    link(folder / "query", 20, "?", images[25:])
    state = create_backbone("Conv4", 84, seed=0).state_dict()
    made_of = folder / "model.tar", folder / "my.classifier"
    save_checkpoint(made_of[0], Checkpoint("1", "noise", "arcMax", "Conv4", 84, [], state, {}, 0, 0.0, {}))
    seconds_of(["predict.py", "--support", folder / "support", "--checkpoint", made_of[0], "--save", made_of[1]])
    return [
        "predict.py",
        "--classifier",
        made_of[1],
        "--query",
        folder / "query",
        "--out",
        folder / "out",
        "--overwrite",
    ]


def rows(setting: Setting, repeats: int) -> list[Row]:
    """A row for each command."""
    with tempfile.TemporaryDirectory() as folder:
        commands: dict[str, Command] = {f"{script}.py --help": [f"{script}.py", "--help"] for script in SCRIPTS}
        commands["predict.py --classifier, 20 images"] = labelling(Path(folder))
        seconds: dict[str, list[float]] = {"import torch": [], **{work: [] for work in commands}}
        for _ in range(1 + repeats):
            for work, of_work in seconds.items():
                of_work.append(seconds_of(commands.get(work, ["-c", "import torch"])))
    medians = {work: statistics.median(of_work[1:]) for work, of_work in seconds.items()}
    reference = medians.pop("import torch")
    return [
        row(work, reference, median, HELP if "--help" in work else LABELLING, note=f"{median / reference:.2f} times it")
        for work, median in medians.items()
    ]
