"""WRN-28-10 with batch norm and ReLU before each convolution (He et al., ECCV 2016), as the few-shot peers have it.

Stem of 16 channels, 3 stages of 4 blocks of 160, 320 and 640 channels, a last batch norm and ReLU, 640 features.
- PreActWideResNet: of S2M2 (global mean) and, as PreActWideResNet_max, of LibFewShot (global maximum): no biases, the
  stride in the first convolution, the shortcut from the activated input.
- BiasedWideResNet: of FEAT and RFS, and of the published repository in compiled form: a bias in each convolution, the
  stride in the second, the shortcut from the raw input, dropout in between.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone

DROPOUT = 0.5  # of BiasedWideResNet while it is trained


class PreActBlock(nn.Module):
    """BN, ReLU, 3x3 convolution, twice, and a shortcut: (b, c_in, h, w) -> (b, c_out, h', w')."""

    def __init__(self, c_in: int, c_out: int, stride: int, bias: bool):
        super().__init__()
        self.bias = bias
        first, second = (1, stride) if bias else (stride, 1)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, first, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, second, padding=1, bias=bias)
        self.shortcut: nn.Module = nn.Identity()
        if c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        z = self.conv1(activated)
        if self.bias:
            z = F.dropout(z, DROPOUT, self.training)
        from_raw = self.bias or isinstance(self.shortcut, nn.Identity)
        return self.conv2(F.relu(self.bn2(z))) + self.shortcut(x if from_raw else activated)


class PreActWideResNet(Backbone):
    """Pre-activation WRN-28-10 for square images of `img_size` pixels; end: "mean" or "max" over the last map."""

    def __init__(self, img_size: int = 84, bias: bool = False, end: str = "mean"):
        super().__init__()
        self.end = end
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=bias)
        self.layers = nn.ModuleList()
        for c_in, c_out, stride in ((16, 160, 1), (160, 320, 2), (320, 640, 2)):
            self.layers.append(PreActBlock(c_in, c_out, stride, bias))
            self.layers.extend(PreActBlock(c_out, c_out, 1, bias) for _ in range(3))
        self.norm = nn.BatchNorm2d(640)
        side = -(-img_size // 4)  # two halvings, each rounding up
        self.map_shape = (640, side, side)
        self.feature_dim = 640
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def blocks(self) -> list[nn.Module]:
        """The stem and the 12 blocks, the last with the batch norm and ReLU behind it."""
        return [self.stem, *self.layers[:-1], nn.Sequential(self.layers[-1], self.norm, nn.ReLU())]
