"""A script of this repository: how it ends, and how another runs it as a command, in a process of its own."""

import _thread
import contextlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from engine.distributed import first_to_fail, leave_ranks
from engine.errors import UserError
from engine.records import REPOSITORY

SECONDS_TO_SAVE = 10.0  # what a command has after Ctrl-C, before it is told again


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main: a UserError becomes one line on stderr and exit status 2, Ctrl-C or SIGTERM a line and 130.

    So does a file or folder that the system refuses, wherever that happens. Several ranks say it once, and a bug, too,
    keeps its traceback but once: the other ranks fail as they lose the one that has it.
    """
    try:
        with interruptible():
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
        print(escaped(line), file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A block in which SIGTERM does what Ctrl-C does, and neither interrupts what saves the state after the first.

    torchrun hands a Ctrl-C on to processes that have met it already. What is ignored from outside stays ignored. One
    that comes in a finalizer, where Python drops what is raised, comes again.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    report, again = sys.unraisablehook, threading.Timer(0, int)

    def listen() -> None:
        for number in heard:
            signal.signal(number, interrupt)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        nonlocal again
        if not isinstance(what.exc_value, KeyboardInterrupt):
            return report(what)
        listen()
        again = threading.Timer(0.02, _thread.interrupt_main, heard[:1])
        again.start()

    listen()
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        again.cancel()
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


def escaped(line: str) -> str:
    """A line in which control characters, of a path or a name, are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)


def script_command(script: str, flags: Sequence[str], nproc_per_node: int | None = None) -> list[str]:
    """What runs a script of the repository's root with this Python; with torchrun if a number of processes is given."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc_per_node)]
    return [sys.executable, *(torchrun if nproc_per_node else []), script, *flags]


def shown(command: Sequence[str]) -> str:
    """A command as one line to paste into a shell at the root of the repository."""
    program = Path(command[0])
    inside = program.is_relative_to(REPOSITORY)
    return shlex.join([str(program.relative_to(REPOSITORY) if inside else program), *command[1:]])


def run_command(command: Sequence[str], seconds_to_save: float = SECONDS_TO_SAVE) -> int:
    """Run a command at the root of the repository, its output shown as it comes, and return its exit status.

    Ctrl-C goes on only after the command, which meets it too, has saved its state and ended. Sent to this process
    alone, it is handed on after `seconds_to_save`.
    """
    process = subprocess.Popen(command, cwd=REPOSITORY)
    try:
        return process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds_to_save)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait()
        raise
