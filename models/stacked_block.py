"""E copies of the last block of Conv4, each with the weights of an episode of its own: forward pass and gradient.

What enters the block is frozen, so that only the block's weights have a gradient. The products are oneDNN's
convolutions, one per copy. All else, where PyTorch would spend longer on calls and on autograd than on arithmetic, is
written out for all copies together. Batch norm and ReLU follow the pooling, as in pooled_norm.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conv4 import ConvBlock
from models.pooled_norm import add_taken, pool


class BlockPass(NamedTuple):
    """A forward pass as its gradient needs it: inputs x (E, n, c_in, h, w) and the weight of their convolution; per
    copy, its maps (n, c, h, w) and the indices of their pooling; the pooled maps and features z, both (E, n, d);
    the mean and inverse standard deviation (E, c) that normalised them."""

    x: Tensor
    weight: Tensor
    maps: list[Tensor]
    indices: list[Tensor]
    pooled: Tensor
    z: Tensor
    mean: Tensor
    invstd: Tensor


class StackedBlock(nn.Module):
    """n_copies of a ConvBlock with batch norm and pooling; dtype: of the convolutions, float32 or bfloat16.

    Parameters and running statistics (n_copies, ...). In train mode, batch norm takes batch statistics and updates the
    running ones; in eval mode it takes the latter.
    """

    def __init__(self, block: ConvBlock, n_copies: int, dtype: torch.dtype):
        super().__init__()
        self.block, self.dtype = [block], dtype  # in a list: no part of this module
        conv, norm = block.conv, block.bn
        first = (conv.weight, cast(Tensor, conv.bias), norm.weight, norm.bias)
        copies = (nn.Parameter(torch.stack([value.detach()] * n_copies)) for value in first)
        self.weight, self.bias, self.gamma, self.beta = copies
        statistics = (cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var))
        self.running_mean, self.running_var = (torch.stack([value] * n_copies) for value in statistics)

    @torch.no_grad()
    def forward(self, x: Tensor) -> BlockPass:
        """Inputs (E, n, c_in, h, w), those of a copy channels-last -> a pass with features z (E, n, d) in float32."""
        conv, norm = self.block[0].conv, self.block[0].bn
        weight, maps, indices, pooled_maps = self.weight.to(self.dtype), list[Tensor](), list[Tensor](), list[Tensor]()
        mean, var = self.running_mean - self.bias, self.running_var.clone()  # of maps without the bias
        for e, x_e in enumerate(x):
            c = F.conv2d(x_e.to(self.dtype), weight[e], padding=conv.padding)
            if self.training:
                running = (self.running_mean[e], self.running_var[e])
                mean[e], var[e] = torch.batch_norm_update_stats(c, *running, cast(float, norm.momentum))
            pooled, index = pool(c, self.gamma[e])
            maps.append(c)
            indices.append(index)
            pooled_maps.append(pooled.flatten(1).float())
        if self.training:
            self.running_mean.add_(self.bias, alpha=cast(float, norm.momentum))
        all_pooled, invstd = torch.stack(pooled_maps), (var + norm.eps).rsqrt()
        scale = self.gamma * invstd
        shift, scale = (self.per_feature(values, all_pooled) for values in (self.beta - mean * scale, scale))
        z = torch.addcmul(shift, all_pooled, scale).relu_()
        return BlockPass(x, weight, maps, indices, all_pooled, z, mean, invstd)

    @staticmethod
    def per_feature(values: Tensor, z: Tensor) -> Tensor:
        """Values per channel (E, c), repeated for features (E, n, d) of d / c values per channel: (E, 1, d)."""
        return values.repeat_interleave(z.shape[-1] // values.shape[-1], 1).unsqueeze(1)

    @torch.no_grad()
    def add_gradient(self, done: BlockPass, of_z: Tensor) -> None:
        """Add what a pass gives to the gradients of the parameters, from the gradient of its features (E, n, d).

        Called once for a pass, whose maps it overwrites. In train mode the bias, which batch norm takes out, has none.
        """
        conv, (n_copies, c) = self.block[0].conv, self.gamma.shape
        of_z = torch.ops.aten.threshold_backward(of_z, done.z, 0)
        of_beta, along = (v.sum(1).view(n_copies, c, -1).sum(2) for v in (of_z, of_z * done.pooled))
        of_gamma = (along - done.mean * of_beta) * done.invstd
        scale = self.gamma * done.invstd
        of_pooled = (of_z * self.per_feature(scale, of_z)).to(self.dtype)
        # In train mode every value moves the mean and the variance, whether or not the pooling took it.
        each = -scale / done.maps[0][:, 0].numel() * self.training
        slope = each * done.invstd * of_gamma
        offset = each * of_beta - slope * done.mean
        of_weight = []
        for e, (x, maps, index) in enumerate(zip(done.x, done.maps, done.indices, strict=True)):
            of_map = of_pooled[e].view(index.shape).contiguous(memory_format=torch.channels_last)
            add_taken(maps, of_map, index, self.gamma[e], slope[e], offset[e])
            inputs, shape = (maps, x.to(self.dtype), done.weight[e]), ([1, 1], conv.padding, [1, 1], False, [0, 0], 1)
            of_weight.append(torch.ops.aten.convolution_backward(*inputs, None, *shape, [False, True, False])[1])
        gradients = [(self.weight, torch.stack(of_weight).float()), (self.gamma, of_gamma), (self.beta, of_beta)]
        if not self.training:
            gradients.append((self.bias, of_beta * scale))
        for parameter, gradient in gradients:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def state(self, e: int) -> dict[str, Tensor]:
        """The state of copy e, as the block itself has it."""
        conv = {"conv.weight": self.weight[e], "conv.bias": self.bias[e]}
        norm = {"bn.weight": self.gamma[e], "bn.bias": self.beta[e], "bn.running_mean": self.running_mean[e]}
        counted = {"bn.num_batches_tracked": self.block[0].state_dict()["bn.num_batches_tracked"]}
        return {**conv, **norm, "bn.running_var": self.running_var[e], **counted}
