"""What turns images into features (backbones) and features into scores (heads)."""

from collections.abc import Sequence

from torch import Generator

from models.conv4 import Conv4
from models.heads import Head, arcMax, cosMax, softMax
from models.resnet12 import ResNet12
from models.resnet18 import ResNet18
from models.torchvision_backbone import TorchvisionBackbone
from models.wide_resnet import WideResNet

Backbone = Conv4 | ResNet12 | ResNet18 | WideResNet | TorchvisionBackbone
BACKBONES: dict[str, type[Conv4] | type[ResNet12] | type[ResNet18] | type[WideResNet]] = {
    "Conv4": Conv4,
    "ResNet12": ResNet12,
    "ResNet18": ResNet18,
    "WideResNet": WideResNet,
}
TORCHVISION = "torchvision:"  # followed by the name of a classification model of torchvision
HEADS = ("softMax", "cosMax", "arcMax")


def native_img_size(name: str) -> int:
    """The image side, in pixels, that a backbone is published with."""
    return TorchvisionBackbone.native_img_size if name.startswith(TORCHVISION) else BACKBONES[name].native_img_size


def build_backbone(name: str, img_size: int, relation: bool = False, weights: str = "none") -> Backbone:
    """A backbone for square images of `img_size` pixels; its output has `.feature_dim` features.

    `relation` gives Conv4 the larger maps of RelationNet, with the same parameters; others have but one form.
    `weights` is 'none', or, for torchvision:NAME, 'DEFAULT' (torchvision's, downloaded) or the path of a state dict.
    Raises ValueError for an unknown name, an image size that the backbone refuses, or weights that cannot be had.
    """
    if name.startswith(TORCHVISION):
        return TorchvisionBackbone(name.removeprefix(TORCHVISION), img_size, weights)
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)} or {TORCHVISION}NAME")
    if weights != "none":
        raise ValueError(f"weights are for {TORCHVISION}NAME backbones, not for {name}: give 'none'")
    return Conv4(img_size, relation=relation) if name == "Conv4" else BACKBONES[name](img_size=img_size)


def build_head(
    method: str,
    d: int,
    n_class: int,
    s: float,
    m: float,
    generators: Sequence[Generator | None] = (None,),
    batched: bool = False,
) -> Head:
    """A head of `n_class` classes on d features, or, if `batched`, one head a generator, fitted together."""
    if method == "softMax":
        return softMax(d, n_class, generators, batched)
    if method == "cosMax":
        return cosMax(d, n_class, s, generators, batched)
    if method == "arcMax":
        return arcMax(d, n_class, s, m, generators, batched)
    raise ValueError(f"unknown head {method!r}: choose one of {', '.join(HEADS)}")
