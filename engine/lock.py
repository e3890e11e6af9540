"""One run at a time on the same files: a lock that the system releases when the process that holds it ends."""

import os
import platform
import time
from pathlib import Path
from typing import IO

from engine.errors import UserError
from engine.files import writing

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # this platform has no such locks: see hold
    flock = None  # type: ignore[assignment]


def hold(path: Path) -> IO[str]:
    """The file at `path`, locked until it is closed, at the latest when the process ends.

    It is never removed, and names the process. Raises UserError, with that name, when another process holds
    it, or when it cannot be written; a process may hold it twice. Prints a note where the file system has no locks.
    """
    me = f"process {os.getpid()} on {platform.node()} since "
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", errors="replace")
    try:
        if flock is None:
            raise OSError("this platform has no flock")
        flock(file, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = " ".join(file.read(200).split()) or "it has just begun"
        if holder.startswith(me):
            return file
        raise UserError(f"another run ({holder}) holds {path}: wait until it ends, or give other folders") from None
    except OSError as error:
        print(f"note: whether another run is at work on these files cannot be known from here: {path}: {error}")
    file.truncate(0)
    file.write(f"{me}{time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file
