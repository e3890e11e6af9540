"""ResNet12, the residual backbone of the few-shot literature (Lee et al., MetaOptNet, CVPR 2019).

Four residual blocks of 64, 160, 320 and 640 channels. A block: three 3x3 convolutions with batch norm and
LeakyReLU(0.1), a 1x1 convolution with batch norm as its shortcut, 2x2 max pooling. Then global average
pooling: 640 features at any image size, 12,424,320 parameters. Convolutions start as He et al. (fan out).

Peers' forms of it: ResNet12_512, of widths 64 to 512 (few-shot-meta-baseline, learn2learn); ResNet12_flat, whose map is
flattened and not averaged (MetaOptNet, DeepEMD); SEResNet12, with squeeze-and-excitation (RFS).
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from models.backbone import Backbone


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate of the means of all (Hu et al., CVPR 2018): (b, c, h, w) -> (b, c, h, w)."""

    def __init__(self, c: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(c, c // 4), nn.ReLU(), nn.Linear(c // 4, c), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((-2, -1)))[..., None, None]


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions and a shortcut, pooled: (b, c_in, h, w) -> (b, c_out, h // 2, w // 2)."""

    def __init__(self, c_in: int, c_out: int, se: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv3 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.se = SqueezeExcitation(c_out) if se else nn.Identity()
        self.relu = nn.LeakyReLU(0.1, inplace=True)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.relu(self.bn1(self.conv1(x)))
        z = self.relu(self.bn2(self.conv2(z)))
        z = self.se(self.bn3(self.conv3(z))) + self.shortcut(x)
        return self.pool(self.relu(z))


class ResNet12(Backbone):
    """ResNet12 for square images of `img_size` pixels; end: "mean" of the map, or "flatten".

    Raises ValueError when the image is too small to be pooled four times.
    """

    def __init__(
        self, img_size: int = 84, widths: Sequence[int] = (64, 160, 320, 640), se: bool = False, end: str = "mean"
    ):
        super().__init__()
        if img_size < 16:
            raise ValueError(f"ResNet12 needs images of at least 16 pixels, not {img_size}: give a larger --img_size")
        self.layers = nn.ModuleList(ResidualBlock(c_in, c_out, se) for c_in, c_out in pairwise([3, *widths]))
        self.end = end
        c, side = widths[-1], img_size // 16
        self.map_shape = (c, side, side)
        self.feature_dim = c * side * side if end == "flatten" else c
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu")
