"""What several tests share: golden numbers, tiny benchmarks, and running a script as a user does."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.benchmarks import Split
from data.converters.converter import SPLITS
from engine.script import run_script
from methods.features import Source
from methods.related_base import RelatedBase, RelatedSetting, related_base_of_head
from models import build_head
from persistence.checkpoints import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
RANDOM = np.random.default_rng(0)

# What the tests marked `device` run on: AA_DEVICE=cuda python -m pytest -m device.
DEVICE = torch.device(os.environ.get("AA_DEVICE", "cpu"))

# A backbone of each class.
ONE_OF_EACH = ("Conv4", "ResNet12", "SEResNet12", "ResNet18", "WideResNet", "PreActWideResNet")

# The flags of a run on a tiny benchmark, and those of its stages 1 and 3.
TINY = ["--dataset", "tiny", "--img_size", 16, "--test_n_way", 3, "--n_shot", 2, "--n_query", 3, "--quiet"]
TRAIN = [*TINY, "--n_epoch", 2, "--batch_size", 16, "--val_episodes", 4, "--n_episodes", 6, "--ft_n_epoch", 20]
FEW_EPISODES = 16  # val episodes of --align_preset auto
ALIGN = [*TINY, "--n_episodes", 3, "--align_iters", 2, "--aug_size", 4, "--n_B", 2, "--ft_n_epoch", 20]
CURVE = [*ALIGN, "--record_curve", 1, "--lr", 0.01]
# What they write.
RUN = "3way_2shot_tiny_arcMax_Conv4"
STAGE_1, STAGE_3 = f"transferLearning_{RUN}", f"associative_alignment_{RUN}_centroid"
CHECKPOINT = f"{RUN}_bestModel.tar"


def golden(name: str) -> dict[str, torch.Tensor]:
    """The arrays of tests/golden/<name>.npz as tensors on DEVICE."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])).to(DEVICE) for key in arrays.files}


def net_without_norms() -> torch.nn.Module:
    """A backbone, custom:tests.helpers:net_without_norms, whose features depend on no other image of a batch."""
    conv = torch.nn.Conv2d(3, 16, 5, stride=2)
    return torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())


def make_benchmark(root: Path, n_class=(6, 6, 6), n_images=8, side=20, seed=0) -> Path:
    """Image folders root/{base,val,novel}/<class>/*.png, each class a colour and a stripe pattern, with noise."""
    rng = np.random.default_rng(seed)
    number = 0
    for split, count in zip(("base", "val", "novel"), n_class, strict=True):
        for _ in range(count):
            colour, period = rng.integers(60, 196, 3), rng.integers(2, 9)
            folder = root / split / f"class{number:02d}"
            folder.mkdir(parents=True)
            number += 1
            for i in range(n_images):
                stripes = 50 * np.sin((np.arange(side) + rng.integers(0, 9)) * 2 * np.pi / period)
                pixels = colour + stripes[:, None, None] + rng.normal(0, 20, (side, side, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return root


def encoded(kind: str = "JPEG", size: tuple[int, int] = (12, 10)) -> bytes:
    """An image file of random pixels, another one at each call."""
    content = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(content, kind)
    return content.getvalue()


def write(path: Path, content: bytes | str | object) -> Path:
    """Write bytes, text, or anything else as JSON, into a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, (bytes, str)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def images_in(folder: Path) -> dict[str, bytes]:
    """{split/class/file: content} of a prepared benchmark."""
    files = (path for split in SPLITS for path in (folder / split).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def make_split(counts=(8,) * 6, side=16, seed=0, split="novel") -> Split:
    """A split in memory: `counts` images of each class, every image a pattern of its class's own plus noise.

    On the CPU, as a split is, whatever the default device.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        pattern = torch.randint(40, 216, (len(counts), 3, side, side), generator=generator)
        noise = torch.randint(-40, 40, (len(labels), 3, side, side), generator=generator)
        sizes = torch.full((len(labels), 2), side)
    return Split(
        benchmark="toy",
        split=split,
        class_names=[f"class{c}" for c in range(len(counts))],
        image_names=[f"class{label}/{i}.png" for i, label in enumerate(labels.tolist())],
        labels=labels,
        images=(pattern[labels] + noise).to(torch.uint8),
        train_images=None,
        train_sizes=sizes,
        fingerprint=f"toy{seed}",
    )


def toy_features(split, d=12, spread=1.2, seed=0):
    """Features (N, d): a direction a class, and noise."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(len(split.class_names), d, generator=generator)
    return centre[split.labels] + spread * torch.randn(len(split.labels), d, generator=generator)


def related_by_logits(logits, labels, n_base_class: int, setting: RelatedSetting) -> RelatedBase:
    """The related base of base samples with these labels (N,), by a head whose logits (N, n_way) are these."""
    head = build_head("softMax", logits.shape[1], logits.shape[1], 1.0, 0.0)
    head.weight.data, head.bias.data = torch.eye(logits.shape[1]), torch.zeros(logits.shape[1])
    split = replace(make_split((1,) * n_base_class, side=1, split="base"), labels=labels)
    return related_base_of_head(head, Source(logits, None, split), setting)


def run(script: str, *flags: object, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script of the repository, or `-m` and a module, in a process of its own; with `check`, it must succeed."""
    result = subprocess.run(
        [sys.executable, script if script == "-m" else str(ROOT / script), *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if check:
        assert result.returncode == 0, result.stderr[-3000:]
    return result


@dataclass(frozen=True)
class Outcome:
    """How a script ended: exit status and what it printed."""

    status: int
    out: str
    err: str


def call(script: str, *flags: object) -> Outcome:
    """Run a script's main in this process, which saves the seconds of importing torch; ends as the script would."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    main = importlib.import_module(script).main
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        try:
            run_script(main)
        except SystemExit as end:
            status = int(end.code or 0)
    return Outcome(status, out.getvalue(), err.getvalue())


def folders(root: Path, results: str = "results") -> list[object]:
    """The folder flags of a run whose files all lie below `root`."""
    return [
        *("--benchmarks_dir", root / "benchmarks", "--cache_dir", root / "cache"),
        *("--results_dir", root / results, "--checkpoint_dir", root / results / "models"),
    ]


def result(root: Path, name: str, results: str = "results") -> dict:
    """The result of a run whose files lie below `root`."""
    return json.loads((root / results / "tables" / f"{name}.json").read_text())


def metrics(root: Path, run: str = STAGE_3, results: str = "results") -> list[dict]:
    """The rows of the metrics of a run."""
    return [json.loads(line) for line in (root / results / "logs" / run / "metrics.jsonl").read_text().splitlines()]


def align(root: Path, *flags: object, results: str = "results") -> Outcome:
    """Stage 3 in `root` on its own checkpoint, its results below `results`; the outcome, which must be good."""
    where = [*folders(root), "--results_dir", root / results]
    outcome = call("associative_alignment", *CURVE, *where, *flags)
    assert outcome.status == 0, outcome.err
    return outcome


def numbers(root: Path, script: str) -> dict:
    """All numbers that a stage leaves, but for times: its weights, metrics and result."""
    results = root / "results"
    (table,) = (results / "tables").glob(f"{script}_*.json")
    record = json.loads(table.read_text())
    found = {key: value for key, value in record.items() if key not in ("seconds", "config", "command", "commit")}
    found.pop("checkpoint", None)
    if script == "associative_alignment":
        found["metrics"] = (results / "logs" / table.stem / "metrics.jsonl").read_text()
        episode = torch.load(results / "episodes" / f"{table.stem}.pt", "cpu", weights_only=True)
        found["features"] = [v.numpy().tobytes() for kind in ("support", "related") for v in episode[kind].values()]
    else:
        stem = table.stem.removeprefix(f"{script}_")
        rows = (results / "logs" / f"{stem}_bestModel" / "metrics.jsonl").read_text().splitlines()
        found["metrics"] = [{k: v for k, v in json.loads(row).items() if k != "seconds"} for row in rows]
        best = load_checkpoint(results / "models" / f"{stem}_bestModel.tar")
        last = torch.load(results / "models" / f"{stem}_last.tar", "cpu", weights_only=True)
        found["epoch"], found["val_accuracy"] = best.epoch, best.val_accuracy
        states = [best.backbone_state, best.head_state, last["backbone"], last["head"]]
        states += list(last["optimizer"]["state"].values())
        found["tensors"] = [value.numpy().tobytes() for state in states for value in state.values()]
    return found


def wait_until(is_so, out, seconds=120):
    """Wait until is_so() is true of a process that writes to the file `out`."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, out.read_text()
        time.sleep(0.002)


class Processes:
    """Starts scripts in processes of their own (see fork_server)."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        assert self.server.stdout.readline() == "ready\n"

    def ask(self, line):
        self.server.stdin.write(line + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, script, flags, output, max_bytes=0):
        """Start one; returns its process id."""
        command = {"script": script, "flags": list(map(str, flags)), "output": str(output), "max_bytes": max_bytes}
        return self.ask(json.dumps(command))

    def wait(self):
        """Exit status, negative for a signal, of the one that was started last."""
        return self.ask("wait")

    def run(self, script, flags, output, max_bytes=0):
        self.start(script, flags, output, max_bytes)
        return self.wait()
