"""What a piece of work takes against what is there, before it begins: memory and disk."""

import re
import shutil
from pathlib import Path

from engine.errors import UserError

MEMINFO = Path("/proc/meminfo")
NEARLY_ALL = 0.8


def check_memory(what: str, n_bytes: int, remedy: str) -> None:
    """Raise UserError when `what` takes more than the memory that is free; print a note when it takes nearly all.

    Where the system does not say how much that is, nothing is checked.
    """
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text())
    except OSError:
        return
    if found:
        compare(what, n_bytes, 1024 * int(found[1]), "memory", remedy)


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
