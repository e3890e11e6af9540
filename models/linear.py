"""A linear map in the way that is fastest on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as F.linear: (..., d) by (k, d) -> (..., k).

    In float32 on an x86 CPU it is a 1x1 convolution, the same sums by another library: PyTorch leaves a matrix product
    to MKL, whose fast kernels are for Intel's processors, but a convolution to oneDNN, which on an AMD processor was
    twice as fast.
    """
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not x.numel()
    if plain or not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return F.linear(x, weight, bias)
    pixels = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    return F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))
