"""What a piece of work takes against what is there, before it begins: memory and disk."""

import re
import shutil
from pathlib import Path

import torch

from engine.errors import UserError

MEMINFO = Path("/proc/meminfo")
CPU = torch.device("cpu")
NEARLY_ALL = 0.8


def free_memory(device: torch.device) -> int | None:
    """The bytes that are free on a GPU, or of the machine for its CPU; None where nothing says how many.

    On a GPU those are free as well that PyTorch has taken and does not use.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text())
    except OSError:
        return None
    return 1024 * int(found[1]) if found and device.type == "cpu" else None


def has_room(n_bytes: int, device: torch.device, taken: int = 0) -> bool:
    """Whether so much is moved to a GPU for good: where it is less than half of what is free, `taken` beside it."""
    return device.type == "cuda" and n_bytes < ((free_memory(device) or 0) - taken) / 2


def check_memory(what: str, n_bytes: int, remedy: str, device: torch.device = CPU) -> None:
    """Raise UserError when `what` takes more than the memory that is free; print a note when it takes nearly all.

    Where the system does not say how much that is, nothing is checked.
    """
    if (free := free_memory(device)) is not None:
        compare(what, n_bytes, free, "memory" if device.type == "cpu" else f"memory of {device}", remedy)


def check_disk(what: str, n_bytes: int, folder: Path, remedy: str) -> None:
    """The same for the space that is free on the disk of a folder, which need not exist yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    compare(what, n_bytes, shutil.disk_usage(there).free, f"disk in {there}", remedy)


def compare(what: str, n_bytes: int, free: int, where: str, remedy: str) -> None:
    """Raise UserError when n_bytes are more than are free; print a note when they are nearly all."""
    line = f"{what} takes {n_bytes / 1e9:,.1f} GB of {where}, of which {free / 1e9:,.1f} GB are free"
    if n_bytes > free:
        raise UserError(f"{line}: {remedy}")
    if n_bytes > NEARLY_ALL * free:
        print(f"note: {line}")
