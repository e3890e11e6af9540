"""Running the scripts of this repository as commands, each in a process of its own."""

import contextlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from methods.engine import REPOSITORY

SECONDS_TO_SAVE = 10.0  # what a command has after Ctrl-C, before it is told again


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
