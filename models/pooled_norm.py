"""Batch norm, 2x2 max pooling and ReLU in one, in train mode: the same numbers in a third of the memory.

A batch norm is an increasing map of each channel, or a decreasing one where its weight is negative. So the pooling can
come first, as a maximum or a minimum, with the statistics still those of the whole map: the normalised map, four times
the result, is never made. Nor is its gradient, which takes the place of the input: that is needed no more by then.

A bias of the convolution before is taken out again by the batch norm. It moves the running mean alone, and its
gradient is zero: summed over the map, it would be rounding, at up to a tenth of the time of a training step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Images, and elements of maps, whose gradient is spread over the map together, while it is in a cache.
CACHE_ROWS = 8
CACHE_ELEMENTS = 2**19


def pool(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """2x2 maxima of the channels (minima where the weight is negative) and their indices: (b, c, h // 2, w // 2)."""
    if not bool((weight < 0).any()):
        return F.max_pool2d(x, 2, return_indices=True)
    sign = torch.where(weight < 0, -1.0, 1.0).to(x.dtype).view(-1, 1, 1)
    pooled, index = F.max_pool2d(x * sign, 2, return_indices=True)
    return pooled * sign, index


def add_taken(x: Tensor, of_pooled: Tensor, index: Tensor, weight: Tensor, slope: Tensor, offset: Tensor) -> None:
    """Over x: x * slope + offset, and the gradient of the pooled maps where the pooling took x."""
    # Repeated along a row of the map: of a channels-last one PyTorch would else vectorise over the channels alone.
    row = x[:1, :, :1]
    slope, offset = (torch.empty_like(row).copy_(v.view(-1, 1, 1)) for v in (slope, offset))
    rows = max(CACHE_ROWS, CACHE_ELEMENTS // x[0].numel())
    for first in range(0, len(x), rows):
        part, of_part = (v[first : first + rows] for v in (x, of_pooled))
        at = index[first : first + rows] if len(index) else pool(part, weight)[1]
        taken = torch.ops.aten.max_pool2d_with_indices_backward(
            of_part, part, [2, 2], [2, 2], [0, 0], [1, 1], False, at
        )
        torch.addcmul(taken, part, slope, out=part).add_(offset)


class PooledNorm(torch.autograd.Function):
    """See pooled_norm; returns also what the backward pass needs."""

    @staticmethod
    def forward(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, ...]:
        assert norm.momentum is not None
        mean, var = torch.batch_norm_update_stats(x, norm.running_mean, norm.running_var, norm.momentum)
        pooled, index = pool(x, weight)
        # In single precision the indices are found again: kept, they would be twice as large as what was pooled. In
        # half precision, which needs less memory, that would be a tenth of the time.
        index = index.new_empty(0) if x.dtype == torch.float32 else index
        y = F.batch_norm(pooled, mean, var, weight, bias, eps=norm.eps).relu_()
        if norm.running_mean is not None:
            norm.running_mean.add_(shift, alpha=norm.momentum)
        return y, pooled, index, mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, weight, _, norm = inputs
        ctx.save_for_backward(x, weight, *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.eps = norm.eps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, pooled, index, mean, var = ctx.saved_tensors
        invstd = (var + ctx.eps).rsqrt()
        of_pooled, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            torch.ops.aten.threshold_backward(gradient, y, 0),
            *(pooled, weight, mean, var, mean, invstd, False, ctx.eps, [True, True, True]),
        )
        # Every x moves the mean and the variance, whether or not the pooling took it.
        n = x.numel() / x.shape[1]
        slope = -weight * invstd.square() * of_weight / n
        offset = -weight * invstd * of_bias / n - slope * mean
        add_taken(x, of_pooled, index, weight, slope, offset)
        return x, torch.zeros_like(of_bias), of_weight, of_bias, None


def pooled_norm(x: Tensor, shift: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """relu(max_pool2d(norm(x + shift), 2)) of a norm in train mode, on a CPU: (b, c, h, w) -> (b, c, h // 2, w // 2).

    shift (c,): the bias of the convolution that made x without it.

    The running statistics are updated. The backward pass overwrites x, so nothing else may need x, and it runs once;
    there is no second derivative. Raises ValueError for a single value per channel, as nn.BatchNorm2d.
    """
    if x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return PooledNorm.apply(x, shift, norm.weight, norm.bias, norm)[0]
