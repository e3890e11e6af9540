"""Conv4, the four-block backbone of the few-shot literature (Vinyals et al., NeurIPS 2016).

Four blocks of 3x3 convolution (64 channels, with bias), batch norm, ReLU and 2x2 max pooling, flattened:
1600 features at 84x84. With `relation=True` it is the variant of RelationNet (Sung et al., CVPR 2018):
two unpadded pooled blocks, then two padded blocks without pooling, a 64x19x19 map at 84x84. Peers' forms: Conv4_max,
the maximum over the map (FEAT's ConvNet), and Conv4_mean, the mean over a last map that is not pooled (RFS).
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from models.backbone import Backbone
from models.pooled_norm import pooled_norm


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm, ReLU and, if `pool`, 2x2 max pooling: (b, c_in, h, w) -> (b, c_out, h', w')."""

    def __init__(self, c_in: int, c_out: int, padding: int = 1, pool: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel_size=3, padding=padding)
        self.bn = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        nn.init.normal_(self.conv.weight, 0.0, math.sqrt(2.0 / (3 * 3 * c_out)))

    def forward(self, x: Tensor) -> Tensor:
        # pooled_norm takes a plain batch norm, which nn.SyncBatchNorm may have replaced, and at least one image.
        conv, norm = self.conv, self.bn
        plain = isinstance(norm, nn.BatchNorm2d) and isinstance(self.pool, nn.MaxPool2d) and len(x) > 0
        learns = torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad)
        if plain and self.training and learns and x.device.type == "cpu":
            return pooled_norm(F.conv2d(x, conv.weight, padding=conv.padding), cast(Tensor, conv.bias), norm)
        if not self.training and not learns:  # a frozen batch norm is part of the convolution
            mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
            weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, var, norm.eps, norm.weight, norm.bias)
            return self.relu(self.pool(F.conv2d(x, weight, bias, padding=conv.padding)))
        # ReLU is increasing, so it may follow the pooling: the same numbers, on a quarter of the map.
        return self.relu(self.pool(self.bn(self.conv(x))))


class Conv4(Backbone):
    """Conv4 for square images of `img_size` pixels; `width` channels per block; end: flatten, max or mean of the map.

    relation: RelationNet's form; pool_last: whether the last block is pooled, too. Raises ValueError when the image is
    too small to survive the four blocks.
    """

    def __init__(
        self, img_size: int = 84, width: int = 64, relation: bool = False, end: str = "flatten", pool_last: bool = True
    ):
        super().__init__()
        self.end = end
        if relation:
            side = ((img_size - 2) // 2 - 2) // 2
            layout = [(0, True), (0, True), (1, False), (1, False)]
        else:
            side = img_size // 16 if pool_last else img_size // 8
            layout = [(1, True)] * 3 + [(1, pool_last)]
        if side < 1:
            raise ValueError(f"Conv4 needs images of at least 16 pixels, not {img_size}: give a larger --img_size")
        c_in = [3] + [width] * 3
        self.layers = nn.ModuleList(
            ConvBlock(c, width, padding, pool) for c, (padding, pool) in zip(c_in, layout, strict=True)
        )
        self.map_shape = (width, side, side)
        self.feature_dim = width * side * side if end == "flatten" else width
