"""Batch norm over a batch that several processes hold together, on any device: torch's SyncBatchNorm is for GPUs alone.

In train mode mean and variance are those of all processes' images, and the gradient flows through them; a process may
hold none. In eval mode, and in its state dict, it is the layer that it was made of.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' tensors of one shape, on each; a loss of any process sends its gradient to all."""

    # torch.distributed.nn.functional.all_reduce does the same, but newer versions of torch warn that it is deprecated;
    # what they name in its place is private, and gives no gradient in torch 2.10.

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm(nn.Module):
    """`layer`, whose weights and statistics it shares, over the batches (b_i, c, h, w) of all processes.

    A library's batch norm may have an activation as its child, which follows it.
    """

    def __init__(self, layer: nn.BatchNorm2d):
        super().__init__()
        self.then = nn.Sequential(*layer.children())
        self.weight, self.bias = layer.weight, layer.bias
        self.eps = layer.eps
        self.momentum = layer.momentum  # None: the plain mean of all batches so far
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        for name, value in layer.named_buffers():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            return self.then(x)
        full = x.float()
        n = torch.full((1,), float(full.numel() // full.shape[1]), device=x.device)  # a copy would wait for a GPU
        dist.all_reduce(n)
        mean = SumOverProcesses.apply(full.sum((0, 2, 3))) / n
        centred = full - mean.view(-1, 1, 1)
        variance = SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * n / (n - 1).clamp_min(1), share)
        scale = self.weight * (variance + self.eps).rsqrt()
        return self.then((centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype))


def use_global_batch_norm(module: nn.Module) -> None:
    """Put a GlobalBatchNorm in the place of every BatchNorm2d inside `module`, which keeps its parameters."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, GlobalBatchNorm(child))
        else:
            use_global_batch_norm(child)
