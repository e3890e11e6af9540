"""Half precision of a forward pass, the step that goes with it, and a loss that is no number."""

import contextlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError

CPUINFO = Path("/proc/cpuinfo")
READ_SECONDS = 0.5  # between two readings of losses, for each of which a GPU finishes the steps before
BF16_UNITS = {"amx_bf16", "avx512_bf16", "bf16"}  # as x86 and Arm call what multiplies bf16 numbers


def choose_precision(name: str, device_type: str) -> str:
    """The precision of this name; `auto` is bf16 where the device computes in it, not by emulation, else fp32."""
    if name != "auto":
        return name
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    units = CPUINFO.read_text().split() if device_type == "cpu" and CPUINFO.is_file() else []
    return "fp32" if BF16_UNITS.isdisjoint(units) else "bf16"


@dataclass
class Precision:
    """Autocast of the backbone's forward pass to fp32, bf16 or fp16; heads, distances and losses stay in float32."""

    name: str = "fp32"
    device_type: str = "cpu"
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, torch.bfloat16 if self.name == "bf16" else torch.float16)

    def backward_and_step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """One step of the optimiser on a loss, returned detached; fp16 scales it so that small gradients survive."""
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
        return loss.detach()


def check_finite(loss: Tensor | float, where: str) -> None:
    """Raise UserError, saying where, when a loss is no longer finite."""
    value = float(loss)
    if not math.isfinite(value):
        raise UserError(f"the loss became {value} at {where}: lower --lr, or use --precision fp32")


@dataclass
class Losses:
    """The losses of one step after another, which stay on the device and are read every READ_SECONDS, and at the end.

    where: what the steps are counted as, such as `epoch 3, batch`. A step has a row of scalars, its loss first.
    """

    where: str
    rows: list[tuple[float, ...]] = field(default_factory=list)
    unread: list[tuple[Tensor, ...]] = field(default_factory=list)
    read_at: float = -math.inf

    def add(self, loss: Tensor, *figures: Tensor) -> bool:
        """Keep the row of a step; whether all rows have been read now. Raises UserError as read does."""
        self.unread.append((loss.detach(), *(value.detach() for value in figures)))
        if time.monotonic() - self.read_at < READ_SECONDS:
            return False
        self.read()
        return True

    def read(self) -> list[tuple[float, ...]]:
        """The rows of all steps. Raises UserError, naming the step, when a loss is no longer finite."""
        if self.unread:
            values = torch.stack([value for row in self.unread for value in row])
            for row in values.view(len(self.unread), -1).tolist():
                check_finite(row[0], f"{self.where} {len(self.rows)}")
                self.rows.append(tuple(row))
            self.unread.clear()
        self.read_at = time.monotonic()
        return self.rows
