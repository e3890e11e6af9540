"""Half precision of a forward pass, the step that goes with it, and a loss that is no number."""

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError


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

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
        """One step of the optimiser on a loss, whose value it returns; fp16 scales it so that small gradients survive.

        What the optimiser's parameters held as gradients before is dropped.
        """
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
        return loss.item()


def check_finite(loss: Tensor | float, where: str) -> None:
    """Raise UserError, saying where, when a loss is no longer finite."""
    value = loss.item() if isinstance(loss, Tensor) else loss
    if not math.isfinite(value):
        raise UserError(f"the loss became {value} at {where}: lower --lr, or use --precision fp32")
