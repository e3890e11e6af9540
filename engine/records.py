"""JSON records, and what a record says of how it was made."""

import json
import math
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from engine.files import write_text
from engine.run import Run

REPOSITORY = Path(__file__).resolve().parent.parent


def git_commit() -> str:
    """The commit of this repository, `-dirty` appended when tracked files differ; `unknown` outside git."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", *words]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()

    try:  # without describe's own --dirty, which writes to the repository and, killed, would leave a lock there
        dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("describe", "--always", "--abbrev=12", "--exclude=*") + dirty
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance(config: dict[str, Any], run: Run) -> dict[str, Any]:
    """What a result row says of how it was made: command, seed, config, versions, commit, device, processes."""
    return {
        "command": " ".join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "n_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "seed": run.seed,
        "config": config,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "commit": git_commit(),
        "device": torch.cuda.get_device_name(run.device)
        if run.device.type == "cuda"
        else f"{run.device.type}, {platform.machine()}",
    }


def duration(seconds: float) -> str:
    """A time in words: `42 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def to_json(value: Any) -> Any:
    """A value as JSON can hold it: paths as text, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file atomically. Raises UserError when the folder cannot be written."""
    write_text(path, json.dumps(to_json(record), indent=1) + "\n")
