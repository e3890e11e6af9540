"""One run at a time on the same files: a lock that the system drops when the process that holds it ends."""

import contextlib
import os
import platform
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from engine.errors import UserError

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # on this platform there is none: see hold
    flock = None  # type: ignore[assignment]


def hold(path: Path, owner: object) -> None:
    """Lock the file at `path` (see take) until `owner` is gone or this process ends.

    Raises UserError when another process holds it, or when it cannot be written.
    """
    try:
        file = take(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): give another folder") from error
    if file:
        weakref.finalize(owner, release_at_end, path, file)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """A block that holds the lock at `path` (see take), and has it removed at its end. Raises what take does."""
    file = take(path)
    try:
        yield
    finally:
        if file:
            release(path, file)


def take(path: Path) -> IO[str] | None:
    """Lock the file at `path`, which says who holds it; None when this process holds it already.

    Raises UserError, naming the process that holds it, when another does; OSError when it cannot be written. Where
    that cannot be known, as there are no locks or the file is left from another machine, a line says so.
    """
    machine, why = platform.node(), ""
    while True:
        file = open(path, "a+", errors="replace")
        file.seek(0)
        try:
            if flock is None:
                raise OSError("this platform has no locks")
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            holder = " ".join(file.read().split())[:200] or "it has just begun"
            if holder.startswith(f"process {os.getpid()} on {machine} "):
                return None
            raise UserError(
                f"another run is at work on these files ({holder}): wait until it ends, or give another "
                f"--results_dir and --checkpoint_dir; the lock is {path}"
            ) from None
        except OSError as error:
            why = str(error)
        # The holder before removes the file: a lock on one that is no longer there keeps nobody out.
        with contextlib.suppress(FileNotFoundError):
            if why or os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    left = " ".join(file.read().split())[:200]
    if left and f" on {machine} " not in left:
        why = f"{path} was left by {left}"
    if why:
        print(f"note: whether another run is at work on these files cannot be known from here: {why}")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {machine} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file


def is_free(path: Path) -> bool:
    """Whether the process that made a lock file, on this machine, is gone; False where that cannot be known.

    One that holds nothing is of a process that was killed as it began.
    """
    if flock is None:
        return False
    try:
        with open(path, errors="replace") as file:
            flock(file, LOCK_EX | LOCK_NB)
            holder = file.read()
            return not holder or f" on {platform.node()} " in holder
    except OSError:
        return False


def release(path: Path, file: IO[str]) -> None:
    """Remove and unlock a lock file that this process holds."""
    with contextlib.suppress(OSError):
        path.unlink()
    file.close()


def release_at_end(path: Path, file: IO[str]) -> None:
    """Release a lock when its owner has gone; a signal that comes meanwhile finds the run done."""
    try:
        release(path, file)
    except KeyboardInterrupt:  # in a finalizer it would end in a traceback; no second one comes (see interruptible)
        release(path, file)
