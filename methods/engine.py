"""What every script needs around the learning: device, precision, memory, errors, result files."""

import contextlib
import ctypes
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor, nn

from data.errors import UserError
from data.files import atomic_file
from data.generators import make_generator
from methods.distributed import ALONE, Ranks, first_to_fail, leave_ranks

REPOSITORY = Path(__file__).resolve().parent.parent


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main: a UserError becomes one line on stderr and exit status 2, Ctrl-C a line and 130.

    So does a file or folder that the system refuses, wherever that happens. Several ranks say it once, and a bug, too,
    keeps its traceback but once: the other ranks fail as they lose the one that has it.
    """
    try:
        main()
        leave_ranks()
        return
    except UserError as error:
        line, status = f"error: {error}", 2
    except OSError as error:
        line, status = f"error: {error}: check this path, and that you may read and write there", 2
    except KeyboardInterrupt as interruption:
        line, status = str(interruption) or "interrupted", 130
    except Exception:
        if first_to_fail():
            raise
        sys.exit(1)
    if first_to_fail():
        print(line, file=sys.stderr)
    sys.exit(status)


def keep_memory() -> None:
    """Tell glibc to keep freed memory instead of handing each large activation back to the kernel.

    Otherwise half the time of CPU training goes to page faults. Call before the first large allocation; does
    nothing where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def select_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises UserError when the named device is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        there = ", ".join(kind for kind, yes in available.items() if yes)
        raise UserError(f"--device {name} is not available on this machine: choose auto or one of {there}")
    return torch.device(name)


def device_of_rank(device: torch.device, ranks: Ranks) -> torch.device:
    """The GPU of this rank among those of its machine, or the CPU, which the ranks share.

    Raises UserError when there are more ranks than GPUs, or for a device that ranks cannot exchange tensors on.
    """
    if device.type == "cpu":
        return device
    if device.type != "cuda" or ranks.local >= torch.cuda.device_count():
        there = f"{torch.cuda.device_count()} CUDA GPUs" if device.type == "cuda" else "one process"
        raise UserError(f"--device {device.type} is for {there} here: give a smaller --nproc_per_node, or --device cpu")
    torch.cuda.set_device(ranks.local)
    return torch.device("cuda", ranks.local)


@dataclass
class Precision:
    """Autocast of the backbone's forward pass to fp32, bf16 or fp16; heads, distances and losses stay in float32."""

    name: str
    device_type: str
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, torch.bfloat16 if self.name == "bf16" else torch.float16)

    def backward_and_step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Backward pass and optimiser step; with fp16 the loss is scaled so that small gradients survive."""
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()


def check_finite(loss: Tensor | float, where: str) -> None:
    """Raise UserError, saying where, when a loss is no longer finite."""
    value = loss.item() if isinstance(loss, Tensor) else loss
    if not math.isfinite(value):
        raise UserError(f"the loss became {value} at {where}: lower --lr, or use --precision fp32")


def on_device(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images moved to a GPU for good when they take less than half its free memory; else left mapped."""
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return images.to(device)
    return images


def n_parameters(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def git_commit() -> str:
    """The commit of this repository, `-dirty` appended when tracked files differ; `unknown` outside git."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def provenance(config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What a result row says of how it was made: command, seed, config, versions, commit, device, processes."""
    return {
        "command": " ".join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "n_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "seed": config["seed"],
        "config": config,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "commit": git_commit(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {platform.machine()}",
    }


def plain(value: Any) -> Any:
    """A value as JSON can hold it: paths as text, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file atomically. Raises UserError when the folder cannot be written."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(plain(record), indent=1) + "\n")


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one line to a metrics file. Raises UserError when the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps(plain(record)) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): free some space or give another folder") from error


def start(device: str, precision: str, no_keep_memory: bool, ranks: Ranks = ALONE) -> tuple[torch.device, Precision]:
    """The device and precision of a run; on a CPU also the memory setting (see keep_memory).

    Of several ranks each takes a GPU of its own. Raises UserError when there is no such device for this rank.
    """
    chosen = select_device(device)
    if ranks.n > 1:
        chosen = device_of_rank(chosen, ranks)
    if chosen.type == "cpu" and not no_keep_memory:
        keep_memory()
    return chosen, Precision(precision, chosen.type)


@contextlib.contextmanager
def seeded(seed: int, *keys: str | int) -> Iterator[None]:
    """Inside, PyTorch's own initialisers and dropout draw from (seed, keys); outside, the generator is as it was.

    That generator is the CPU's; those of other devices, from which nothing here draws outside, stay seeded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(make_generator(seed, *keys).initial_seed())
        yield
