"""The processes of one run, started by torchrun: which one this is, what its share is, how the shares come together.

Every process is a rank. Without torchrun, or with one process, there is no process group: a share is all of it and
nothing is exchanged. Shares are consecutive, so that the parts of all ranks, one after another, are the whole in order.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
# Ranks wait while the first one decodes a benchmark, which takes hours; torchrun ends them when a rank dies.
PATIENCE = timedelta(days=2)
SECONDS_TO_END = 30  # what a rank has to save and end when torchrun has gone; torchrun itself gives as many


@dataclass(frozen=True)
class Ranks:
    """This process is the `rank`-th of n; `local`: its number on its machine, and the number of its GPU."""

    rank: int = 0
    n: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    def share(self, items: range) -> range:
        """The items that this rank computes: consecutive, and as many for each, or one more for the first ranks."""
        each, left = divmod(len(items), self.n)
        start = self.rank * each + min(self.rank, left)
        return items[start : start + each + (self.rank < left)]


ALONE = Ranks()  # a run of one process


def join_ranks() -> Ranks:
    """This process among those that torchrun started, all of which must call this; the others' prints go nowhere."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if not dist.is_initialized():
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    if not ranks.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return ranks


def end_with(launcher: int) -> None:
    """Wait until the process that started this one has gone, then end this one, with SIGTERM and at last SIGKILL.

    Otherwise the ranks of a torchrun that was killed would go on, and write beside those of the next one.
    """
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_END)
    os.kill(os.getpid(), signal.SIGKILL)


def first_to_fail() -> bool:
    """Whether this process is the first of its ranks to ask, which is then the one to say what is wrong.

    An error may be met by all ranks or by one, and torchrun ends the others as soon as one has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=False, timeout=timedelta(seconds=5)
        )
        return store.add(f"failed in attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except (RuntimeError, KeyError):  # the store has gone: better twice than not at all
        return True


def gather_objects(value: T, ranks: Ranks) -> list[T]:
    """The picklable values of all ranks, in their order, on each of them."""
    values = [value] * ranks.n
    if ranks.n > 1:
        dist.all_gather_object(values, value)
    return values


def gather_rows(parts: list[Tensor], ranks: Ranks, device: torch.device | str = "cpu") -> Tensor:
    """The rows of all ranks, in their order, on each of them: parts (n_i, ...) of this rank -> (sum of all n_i, ...).

    parts: on `device`, of one dtype and memory format; some ranks, not all, may have none. They travel over the CPU.
    """
    if ranks.n > 1:
        parts = [part.to(device) for theirs in gather_objects([p.cpu() for p in parts], ranks) for part in theirs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextlib.contextmanager
def rank_0_first(ranks: Ranks) -> Iterator[None]:
    """A block that the first rank runs before the others, which then read the files that it wrote."""
    if not ranks.first:
        gather_objects(None, ranks)
    yield
    if ranks.first:
        gather_objects(None, ranks)


def data_parallel(module: nn.Module, ranks: Ranks) -> nn.Module:
    """The module, if it is trained, with rank 0's weights and gradients averaged over the ranks.

    Running statistics are not averaged: see copy_rank_0.
    """
    learns = any(p.requires_grad for p in module.parameters())
    return DistributedDataParallel(module) if ranks.n > 1 and learns else module


@torch.no_grad()
def copy_rank_0(modules: list[nn.Module], ranks: Ranks) -> None:
    """Broadcast the weights and running statistics of rank 0 to all ranks."""
    for module in modules if ranks.n > 1 else []:
        for value in module.state_dict().values():
            sent = value.contiguous()
            dist.broadcast(sent, src=0)
            value.copy_(sent)
