"""What turns images into features (backbones) and features into scores (heads); each is listed in a dict by its name.

A new backbone or head is one class of the contract, `Backbone` or `Head`, and one entry.
"""

import importlib
import re
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from models.backbone import Backbone
from models.conv4 import Conv4
from models.heads import Generators, Head, arcMax, cosMax, softMax
from models.pretrained import INPUTS, PretrainedBackbone
from models.resnet12 import ResNet12
from models.resnet18 import ResNet18
from models.wide_resnet import WideResNet

BACKBONES: dict[str, type[Backbone]] = {
    "Conv4": Conv4,
    "ResNet12": ResNet12,
    "ResNet18": ResNet18,
    "WideResNet": WideResNet,
}
HEADS: dict[str, type[Head]] = {"softMax": softMax, "cosMax": cosMax, "arcMax": arcMax}
# A network of others: of torchvision, of timm, or what a function of the user's own module makes.
OTHERS = re.compile(r"(torchvision|timm):[\w.]+|custom:[\w.]+:\w+", re.ASCII)
OTHERS_USAGE = "torchvision:NAME, timm:NAME or custom:MODULE:FUNCTION"


@dataclass
class Model:
    """What a stage trains: a backbone and a head (of the base classes, or a meta-learner), by one Adam of rate lr.

    net and classifier: the two as the steps call them, which average gradients when there are several processes.
    """

    backbone: Backbone
    head: nn.Module
    lr: float
    optimizer: torch.optim.Optimizer = field(init=False)
    net: nn.Module = field(init=False)
    classifier: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        parameters = [*self.backbone.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=self.lr, fused=True)
        self.net, self.classifier = self.backbone, self.head


def native_img_size(name: str) -> int:
    """The image side, in pixels, that a backbone is published with; custom:... is made, to ask it.

    Raises ValueError for an unknown model of a library.
    """
    library, _, model = name.partition(":")
    return INPUTS[library](model).img_size if model else BACKBONES[name].native_img_size


def build_backbone(name: str, img_size: int, relation: bool = False, weights: str = "none") -> Backbone:
    """A backbone for square images of `img_size` pixels; its output has `.feature_dim` features.

    `relation` gives Conv4 the larger maps of RelationNet, with the same parameters; others have but one form.
    `weights` is 'none', or, for torchvision:NAME and timm:NAME, 'DEFAULT' (downloaded) or the path of a state dict.
    Raises ValueError for an unknown name, an image size that the backbone refuses, or weights that cannot be had.
    """
    if weights != "none" and not name.startswith(("torchvision:", "timm:")):
        raise ValueError(f"weights are for backbones torchvision:NAME and timm:NAME, not for {name}: give 'none'")
    if OTHERS.fullmatch(name):
        return PretrainedBackbone(name, img_size, weights)
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}, {OTHERS_USAGE}")
    make = BACKBONES[name].for_relation if relation else BACKBONES[name]
    return make(img_size)


def sync_batch_norm(backbone: Backbone) -> Backbone:
    """The backbone, its batch norms over the images of all processes, on GPUs; it shares all parameters."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    if any(list(norm.children()) for norm in norms):  # timm's hold an activation, which PyTorch's conversion drops
        convert = importlib.import_module("timm.layers").convert_sync_batchnorm
    else:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
    return cast(Backbone, convert(backbone))


def build_head(method: str, d: int, n_class: int, s: float, m: float, generators: Generators = None) -> Head:
    """A head of `n_class` classes on d features; of a list of generators, as many heads, fitted together."""
    return HEADS[method](d, n_class, s, m, generators)


def n_parameters(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
