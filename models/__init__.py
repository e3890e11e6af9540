"""What turns images into features (backbones) and features into scores (heads); each is listed in a dict by its name.

A new backbone or head is one class of the contract, `Backbone` or `Head`, and one entry.
"""

import importlib
import re
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from models.backbone import Backbone
from models.basic_resnet import BasicResNet
from models.conv4 import Conv4
from models.heads import Generators, Head, arcMax, cosMax, softMax
from models.preact_wide_resnet import PreActWideResNet
from models.pretrained import INPUTS, PretrainedBackbone
from models.resnet12 import ResNet12
from models.resnet18 import ResNet18

SMALL_STEM: dict[str, Any] = {"stem": 64, "stem_bias": False, "strides": (1, 2, 2, 2)}
# By name: the class, the side in pixels of the images that it is published with, and its other arguments.
BACKBONES: dict[str, tuple[type[Backbone], int, dict[str, Any]]] = {
    "Conv4": (Conv4, 84, {}),
    "ResNet12": (ResNet12, 84, {}),
    "ResNet18": (ResNet18, 224, {}),
    "WideResNet": (BasicResNet, 80, {}),
    # Of peers, whose checkpoints are imported.
    "Conv4_relation": (Conv4, 84, {"relation": True}),
    "Conv4_max": (Conv4, 84, {"end": "max"}),
    "Conv4_mean": (Conv4, 84, {"end": "mean", "pool_last": False}),
    "ResNet12_512": (ResNet12, 84, {"widths": (64, 128, 256, 512)}),
    "ResNet12_flat": (ResNet12, 84, {"end": "flatten"}),
    "SEResNet12": (ResNet12, 84, {"se": True}),
    "ResNet18_84": (BasicResNet, 84, SMALL_STEM | {"widths": (64, 128, 256, 512), "depths": (2, 2, 2, 2)}),
    "BasicResNet12": (BasicResNet, 84, SMALL_STEM | {"widths": (64, 160, 320, 640), "depths": (1, 1, 2, 1)}),
    "PreActWideResNet": (PreActWideResNet, 80, {}),
    "PreActWideResNet_max": (PreActWideResNet, 84, {"end": "max"}),
    "BiasedWideResNet": (PreActWideResNet, 84, {"bias": True}),
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
    return INPUTS[library](model).img_size if model else BACKBONES[name][1]


def build_backbone(name: str, img_size: int, relation: bool = False, weights: str = "none") -> Backbone:
    """A backbone for square images of `img_size` pixels; its output has `.feature_dim` features.

    `relation` gives NAME_relation, whose maps RelationNet compares, with the same parameters, where there is one.
    `weights` is 'none', or, for torchvision:NAME and timm:NAME, 'DEFAULT' (downloaded) or the path of a state dict.
    Raises ValueError for an unknown name, an image size that the backbone refuses, or weights that cannot be had.
    """
    if OTHERS.fullmatch(name):
        return PretrainedBackbone(name, img_size, weights)
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}, {OTHERS_USAGE}")
    form = f"{name}_relation"
    cls, _, options = BACKBONES[form if relation and form in BACKBONES else name]
    return cls(img_size, **options)


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
