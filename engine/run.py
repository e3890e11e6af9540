"""What a run computes on and draws from: its device, precision and share among several processes, its seed."""

import ctypes
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from engine.budget import free_memory
from engine.distributed import ALONE, Ranks
from engine.errors import UserError
from engine.generators import make_generator, seeded
from engine.precision import Precision, choose_precision

# How often a bar writes a line where it cannot write over its last one, such as into a file, in seconds.
LOG_SECONDS = 30.0
LOG_FORMAT = "{desc}: {n_fmt} of {total_fmt} ({unit}), {elapsed} gone, {remaining} to go{postfix}"


class Log:
    """What a bar writes, on stderr, as lines of their own."""

    def write(self, text: str) -> None:
        """Write the text without what moves a cursor, if anything is left."""
        if line := text.strip():
            print(line, file=sys.stderr)


@dataclass(frozen=True)
class Run:
    """What every computation of a run shares; by default a silent one on the CPU, in fp32, of one process.

    graphs: whether steps of fixed shapes are replayed as CUDA graphs.
    """

    device: torch.device = torch.device("cpu")
    precision: Precision = field(default_factory=Precision)
    ranks: Ranks = ALONE
    seed: int = 0
    quiet: bool = True
    graphs: bool = False

    def generator(self, *keys: str | int) -> Generator:
        """A generator that depends on (seed, keys) alone: see make_generator."""
        return make_generator(self.seed, *keys)

    def seeded(self, *keys: str | int) -> AbstractContextManager[None]:
        """A block in which PyTorch's own draws depend on (seed, keys) alone: see seeded."""
        return seeded(self.seed, *keys)

    def bar(self, items: Iterable[Any] | None, name: str, unit: str, **options: Any) -> tqdm:
        """A bar of tqdm over items, unless the run is quiet or the bar has no name.

        Off a terminal it is a line every LOG_SECONDS, and a bar that does not stay (leave=False) is left out.
        """
        options |= {"desc": name, "unit": unit, "disable": self.quiet or not name}
        if not sys.stderr.isatty():
            options |= {"file": Log(), "bar_format": LOG_FORMAT, "delay": LOG_SECONDS, "mininterval": LOG_SECONDS}
            options |= {"miniters": 1, "disable": options["disable"] or not options.get("leave", True)}
        return tqdm(items, **options)


def select_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of this process; `auto` is cuda, else mps, else cpu. Each of several ranks has a CUDA GPU of its own,
    or all share the CPU. Raises UserError when the device is not there, or is too few for the ranks."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind, yes in available.items() if yes]
    name = there[0] if name == "auto" else name
    if name not in there:
        raise UserError(f"--device {name} is not available on this machine: choose auto or one of {', '.join(there)}")
    if ranks.n == 1 or name == "cpu":
        return torch.device(name)
    n_gpus = torch.cuda.device_count()
    if name != "cuda" or ranks.local >= n_gpus:
        most = f"{n_gpus} CUDA GPUs" if name == "cuda" else "one process"
        raise UserError(f"--device {name} is for {most} here: give a smaller --nproc_per_node, or --device cpu")
    torch.cuda.set_device(ranks.local)
    return torch.device(name, ranks.local)


def on_own_threads(work: Callable[[range], Iterable[Any]], numbers: range, most: int) -> Iterator[Any]:
    """What work gives for each of consecutive numbers, in order, of which it takes up to `most` at once.

    As many parts are worked on together as PyTorch uses threads, each by one: small operations gain nothing by more.
    """
    n_threads = torch.get_num_threads()

    def on_one_thread(part: range) -> list[Any]:
        torch.set_num_threads(1)  # for the operations that this thread calls
        return list(work(part))

    size = max(1, min(most, math.ceil(len(numbers) / n_threads)))
    with ThreadPoolExecutor(n_threads) as pool:
        for done in pool.map(on_one_thread, (numbers[i : i + size] for i in range(0, len(numbers), size))):
            yield from done


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


def repeat_exactly() -> None:
    """Have a GPU give the same numbers each time; an operation that has no such form is named in a warning."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def start_run(
    ranks: Ranks, device: str, precision: str, seed: int, quiet: bool, no_keep_memory: bool, cuda_graphs: bool = False
) -> Run:
    """The run that the flags ask for; on a CPU also keep_memory, on a GPU repeat_exactly. Raises as select_device, and
    UserError where CUDA graphs cannot be recorded."""
    chosen = select_device(device, ranks)
    if cuda_graphs and (chosen.type != "cuda" or ranks.n > 1 or precision == "fp16"):
        raise UserError("--cuda_graphs is for one process on a CUDA GPU, in fp32 or bf16: leave it out")
    if chosen.type == "cpu" and not no_keep_memory:
        keep_memory()
    if chosen.type == "cuda":
        repeat_exactly()
    in_precision = Precision(choose_precision(precision, chosen.type), chosen.type)
    return Run(chosen, in_precision, ranks, seed, quiet, cuda_graphs)


def move(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device; from pinned memory, so that neither waits for what a GPU still has to do."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=device.type != "mps")


def move_if_fits(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of a split, moved to a GPU for good when they take less than half of what is free there; else as given."""
    fits = device.type == "cuda" and rows.nbytes < (free_memory(device) or 0) / 2
    return rows.to(device) if fits else rows
