"""Exact bounds of memory and disk, compared with what is free before the work begins."""

import re
import shutil
from pathlib import Path

import torch

from engine.errors import UserError

MEMINFO = Path("/proc/meminfo")
CPU = torch.device("cpu")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU, with what PyTorch holds unused, or of the machine; None where they are unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text())
    except OSError:
        return None
    return 1024 * int(found[1]) if found and device.type == "cpu" else None


def has_room(n_bytes: int, device: torch.device) -> bool:
    """Whether data of a CPU is moved to the device to stay: to a GPU, when it takes less than half of what is free."""
    return device.type == "cuda" and n_bytes < (free_memory(device) or 0) / 2


def check_memory(what: str, n_bytes: int, remedy: str, device: torch.device = CPU) -> None:
    """Raise UserError, with the remedy, when `what` takes more memory than is free; nothing where that is unknown."""
    free = free_memory(device)
    if free is not None and n_bytes > free:
        where = "memory" if device.type == "cpu" else f"memory of {device}"
        raise UserError(f"{takes(what, n_bytes, where, free)}: {remedy}")


def check_disk(what: str, n_bytes: int, folder: Path, remedy: str) -> None:
    """Raise UserError, with the remedy, when `what` takes more than is free on the disk of a folder."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if n_bytes > free:
        raise UserError(f"{takes(what, n_bytes, f'disk in {there}', free)}: {remedy}")


def takes(what: str, n_bytes: int, where: str, free: int) -> str:
    """Needed and free gigabytes in words."""
    return f"{what} takes {n_bytes / 1e9:,.1f} GB of {where}, of which {free / 1e9:,.1f} GB are free"
