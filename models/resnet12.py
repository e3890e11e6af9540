"""ResNet12, the residual backbone of the few-shot literature (Lee et al., MetaOptNet, CVPR 2019).

Four residual blocks of 64, 160, 320 and 640 channels. A block: three 3x3 convolutions with batch norm and
LeakyReLU(0.1), a 1x1 convolution with batch norm as its shortcut, 2x2 max pooling. Then global average
pooling: 640 features at any image size, 12,424,320 parameters. Convolutions start as He et al. (fan out).

Departures: with `drop_rate` > 0, DropBlock (Ghiasi et al., NeurIPS 2018) acts after the last two blocks at
a constant rate; the original also warms the rate up and puts plain dropout after the first two.
"""

from torch import Tensor, nn
from torchvision.ops import DropBlock2d

DROP_BLOCK_SIDE = 5


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions and a shortcut, pooled: (b, c_in, h, w) -> (b, c_out, h // 2, w // 2)."""

    def __init__(self, c_in: int, c_out: int, drop: nn.Module):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv3 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.relu = nn.LeakyReLU(0.1, inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        z = self.relu(self.bn1(self.conv1(x)))
        z = self.relu(self.bn2(self.conv2(z)))
        z = self.bn3(self.conv3(z)) + self.shortcut(x)
        return self.drop(self.pool(self.relu(z)))


class ResNet12(nn.Module):
    """ResNet12 for square images of `img_size` pixels.

    Raises ValueError when the image is too small to be pooled four times, or `drop_rate` is not in [0, 1).
    """

    native_img_size = 84

    def __init__(self, img_size: int = 84, drop_rate: float = 0.0):
        super().__init__()
        if img_size < 16:
            raise ValueError(f"ResNet12 needs images of at least 16 pixels, not {img_size}: give a larger --img_size")
        if not 0.0 <= drop_rate < 1.0:
            raise ValueError(f"ResNet12's drop_rate is a probability below 1, not {drop_rate}")
        widths = [64, 160, 320, 640]
        layers = []
        for i, (c_in, c_out) in enumerate(zip([3, *widths], widths, strict=False)):
            drop: nn.Module = nn.Identity()
            if drop_rate > 0.0 and i >= 2:
                # DropBlock2d wants an odd block; an even map that is smaller than it takes one pixel less.
                side = min(DROP_BLOCK_SIDE, img_size // 2 ** (i + 1))
                drop = DropBlock2d(drop_rate, side - 1 + side % 2)
            layers.append(ResidualBlock(c_in, c_out, drop))
        self.layers = nn.ModuleList(layers)
        self.map_shape = (640, img_size // 16, img_size // 16)
        self.feature_dim = 640
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu")

    def blocks(self) -> list[nn.Module]:
        """The blocks from input to output; forward(x) is `pool_and_flatten` of their composition."""
        return list(self.layers)

    def pool_and_flatten(self, feature_map: Tensor) -> Tensor:
        """(b, 640, h', w') -> (b, 640): the mean over the map."""
        return feature_map.mean((-2, -1))

    def feature_map(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, 640, h', w'), before the average pooling."""
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, 640)."""
        return self.pool_and_flatten(self.feature_map(x))
