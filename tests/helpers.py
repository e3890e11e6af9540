"""What several tests share: golden numbers, tiny benchmarks, and running a script as a user does."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.benchmarks import Split
from engine.script import run_script

ROOT = Path(__file__).resolve().parent.parent


def golden(name: str) -> dict[str, torch.Tensor]:
    """The arrays of tests/golden/<name>.npz as tensors."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


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


def make_split(counts=(8,) * 6, side=16, seed=0, split="novel") -> Split:
    """A split in memory: `counts` images of each class, every image a pattern of its class's own plus noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    pattern = torch.randint(40, 216, (len(counts), 3, side, side), generator=generator)
    noise = torch.randint(-40, 40, (len(labels), 3, side, side), generator=generator)
    return Split(
        benchmark="toy",
        split=split,
        class_names=[f"class{c}" for c in range(len(counts))],
        image_names=[f"class{label}/{i}.png" for i, label in enumerate(labels.tolist())],
        labels=labels,
        images=(pattern[labels] + noise).to(torch.uint8),
        train_images=None,
        train_sizes=torch.full((len(labels), 2), side),
        fingerprint=f"toy{seed}",
    )


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
