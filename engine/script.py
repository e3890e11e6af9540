"""A script of this repository: how it ends, and how another runs it as a command, in a process of its own."""

import contextlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from engine.distributed import first_to_fail
from engine.errors import UserError
from engine.records import REPOSITORY

# What a RuntimeError of PyTorch says when memory runs out: of a GPU, of a CPU, and of a size beyond 64 bits.
NO_MEMORY = ("out of memory", "not enough memory", "DefaultCPUAllocator", "ALLOC_FAILED", "calculation overflowed")
SECONDS_TO_SAVE = 10.0  # what a command has after Ctrl-C, before it is told again


def run_script(main: Callable[[], None], memory_flags: str = "batch or image size") -> None:
    """Run a script's main: a UserError becomes one line on stderr and exit status 2, Ctrl-C or SIGTERM a line and 130.

    A file that the system refuses and running out of memory are user errors as well; memory_flags: the flags that make
    the script take less. Several ranks print once, and a bug keeps its traceback, once.
    """
    try:
        with interruptible():
            main()
            if dist.is_initialized():
                dist.destroy_process_group()
        return
    except UserError as error:
        line, status = f"error: {error}", 2
    except OSError as error:
        line, status = f"error: {error}: check this path, and that you may read and write there", 2
    except KeyboardInterrupt as interruption:
        line, status = str(interruption) or "interrupted", 130
    except Exception as error:
        if not out_of_memory(error):
            if first_to_fail():
                raise
            sys.exit(1)
        line, status = f"error: out of memory ({str(error).splitlines()[0]}): give a smaller {memory_flags}", 2
    if first_to_fail():
        print(escaped(line), file=sys.stderr)
    sys.exit(status)


def out_of_memory(error: Exception) -> bool:
    """Whether Python, numpy or PyTorch, on a CPU or a GPU, has run out of memory."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or any(part in said for part in NO_MEMORY)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A block in which SIGTERM does what Ctrl-C does, and no second signal interrupts the saving of the state.

    torchrun passes a Ctrl-C on to processes that have received it already. A signal ignored from outside stays ignored.
    Python drops an exception that is raised in a finalizer; the next signal then interrupts.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    report = sys.unraisablehook

    def listen() -> None:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, interrupt)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if isinstance(what.exc_value, KeyboardInterrupt):
            listen()
        else:
            report(what)

    listen()
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


def print_notes(notes: Iterable[str]) -> None:
    """Print what a user should know, a line each."""
    for note in notes:
        print(f"note: {note}")


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
