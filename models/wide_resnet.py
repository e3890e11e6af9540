"""WideResNet, WRN-28-10 (Zagoruyko & Komodakis, BMVC 2016) in the post-activation form of the few-shot
literature (Gidaris & Komodakis, CVPR 2018).

A 3x3 stem of stride 1 to 80 channels, then 3 stages of 4 basic blocks of 160, 320 and 640 channels; the first
block of a stage has stride 2 and a 1x1 convolution with batch norm as its shortcut. Global average pooling:
640 features at any image size, 36,579,360 parameters. Only the stem's convolution has a bias. Convolutions
start as He et al. (fan out), which is our choice. That the paper's WideResNet is this one is the best
evidence available, not proof.
"""

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


class WideResNet(Backbone):
    """WRN-28-10 for square images of `img_size` pixels."""

    native_img_size = 80

    def __init__(self, img_size: int = 80):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 80, 3, padding=1), nn.BatchNorm2d(80), nn.ReLU(inplace=True))
        self.layers = nn.ModuleList()
        for c_in, c_out in ((80, 160), (160, 320), (320, 640)):
            self.layers.append(BasicBlock(c_in, c_out, 2))
            self.layers.extend(BasicBlock(c_out, c_out, 1) for _ in range(3))
        side = -(-img_size // 8)  # three halvings, each rounding up
        self.map_shape = (640, side, side)
        self.feature_dim = 640
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def blocks(self) -> list[nn.Module]:
        """The stem and the 12 basic blocks."""
        return [self.stem, *self.layers]
