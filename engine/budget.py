"""Exact bounds of memory and disk, compared with what is free before the work begins."""

import re
import shutil
from pathlib import Path
from typing import Any

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


def cache_bytes() -> int:
    """Bytes of the second-level caches of the CPU cores in use; taken as 1 MiB each where that is unknown."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.get_num_threads() * (known.get("l2_cache_size") or 2**20)


def check_memory(what: str, n_bytes: int, remedy: str, device: torch.device = CPU) -> None:
    """Raise UserError, with the remedy, when `what` takes more memory than is free; nothing where that is unknown."""
    where = "memory" if device.type == "cpu" else f"memory of {device}"
    check_room(what, n_bytes, where, free_memory(device), remedy)


def check_disk(what: str, n_bytes: int, folder: Path, remedy: str) -> None:
    """Raise UserError, with the remedy, when `what` takes more than is free on the disk of a folder."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    check_room(what, n_bytes, f"disk in {there}", shutil.disk_usage(there).free, remedy)


def check_room(what: str, n_bytes: int, where: str, free: int | None, remedy: str) -> None:
    """Raise UserError when `what` takes more than the free bytes, None where they are unknown."""
    if free is not None and n_bytes > free:
        takes = f"{what} takes {n_bytes / 1e9:,.1f} GB of {where}, of which {free / 1e9:,.1f} GB are free"
        raise UserError(f"{takes}: {remedy}")
