"""Residual networks of basic blocks behind a 3x3 stem, for small images: BN after each convolution, ReLU, global mean.

- WideResNet: WRN-28-10 (Zagoruyko & Komodakis, BMVC 2016) in the post-activation form of Gidaris & Komodakis (CVPR
  2018): a stem of 80 channels with a bias, 3 stages of 4 blocks of 160, 320 and 640 channels; 640 features, 36,579,360
  parameters. That the paper's WideResNet is this one is the best evidence available, not proof.
- ResNet18_84: ResNet18 without the 7x7 stem and its pooling, as FEAT, LibFewShot and easyfsl have it, and the published
  repository in compiled form: 512 features, 11,168,832 parameters.
- BasicResNet12: easyfsl's `resnet12`, stages of 1, 1, 2 and 1 blocks; 640 features.

Convolutions start as He et al. (fan out), which is our choice.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from models.backbone import Backbone


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (b, c_in, h, w) -> (b, c_out, h', w')."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        z = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(z)) + self.shortcut(x))


class BasicResNet(Backbone):
    """A stem and stages of basic blocks for square images of `img_size` pixels; by default WRN-28-10.

    widths and depths: channels and blocks of each stage, whose first block has the stage's stride.
    """

    def __init__(
        self,
        img_size: int = 80,
        stem: int = 80,
        stem_bias: bool = True,
        widths: Sequence[int] = (160, 320, 640),
        depths: Sequence[int] = (4, 4, 4),
        strides: Sequence[int] = (2, 2, 2),
    ):
        super().__init__()
        conv = nn.Conv2d(3, stem, 3, padding=1, bias=stem_bias)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(stem), nn.ReLU(inplace=True))
        self.layers = nn.ModuleList()
        c_in, side = stem, img_size
        for width, depth, stride in zip(widths, depths, strides, strict=True):
            for i in range(depth):
                self.layers.append(BasicBlock(c_in, width, stride if i == 0 else 1))
                c_in = width
            side = -(-side // stride)  # each stride rounds up
        self.map_shape = (c_in, side, side)
        self.feature_dim = c_in
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def blocks(self) -> list[nn.Module]:
        """The stem and the basic blocks."""
        return [self.stem, *self.layers]
