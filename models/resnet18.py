"""ResNet18 (He et al., CVPR 2016): torchvision's resnet18, without pretrained weights and without its fc.

11,176,512 parameters, 512 features. Parameters keep torchvision's names, so the backbone's state dict is
torchvision's without `fc`. That the paper's ResNet18 is this one is the best evidence available, not proof.
"""

from torch import nn

from models.backbone import Backbone


class ResNet18(Backbone):
    """ResNet18 for square images of `img_size` pixels."""

    def __init__(self, img_size: int = 224):
        super().__init__()
        from torchvision.models import resnet18  # whose import takes a second

        net = resnet18(weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        side = -(-img_size // 32)  # five halvings, each rounding up
        self.map_shape = (512, side, side)
        self.feature_dim = 512

    def blocks(self) -> list[nn.Module]:
        """The stem and the 8 residual blocks."""
        stem = nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool)
        return [stem, *self.layer1, *self.layer2, *self.layer3, *self.layer4]
