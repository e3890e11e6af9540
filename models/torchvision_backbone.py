"""Any classification model of torchvision as a backbone, with ImageNet weights or without: what a user with
a small folder of images wants.

The last layer of the classifier is removed; what it was fed is the feature. Models that make a feature map
(ResNet, VGG, MobileNet, EfficientNet, ConvNeXt, DenseNet, RegNet, Swin, ...) are cut into their blocks, and a
tail that pools; the others (ViT, GoogLeNet, Inception) are a single block, and their map is (d, 1, 1).
"""

import difflib
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from engine.files import load_tensors
from models.backbone import Backbone

# The attributes of a torchvision model that, called one after another, make its feature map.
TRUNKS = (
    ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),  # ResNet, ResNeXt
    ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"),  # ShuffleNet
    ("stem", "trunk_output"),  # RegNet
    ("stem", "blocks"),  # MaxViT
    ("layers",),  # MNASNet
    ("features", "norm", "permute"),  # Swin
    ("features",),  # AlexNet, VGG, SqueezeNet, MobileNet, EfficientNet, ConvNeXt, DenseNet
)
CLASSIFIERS = ("fc", "classifier", "head", "heads")


def pretrained_network(name: str) -> nn.Module:
    """A torchvision model with the weights that torchvision downloads. Raises ValueError if it cannot."""
    try:
        return torchvision.models.get_model(name, weights="DEFAULT")
    except (OSError, RuntimeError) as error:  # no network, or a broken file
        raise ValueError(
            f"the ImageNet weights of {name} could not be downloaded ({error}): fetch them on another machine "
            "and give --weights PATH, or train from scratch with --weights none"
        ) from error


def remove_classifier(net: nn.Module) -> None:
    """Replace the last linear layer (SqueezeNet: convolution) of the classifier by the identity, in place."""
    classifier = next(name for name in CLASSIFIERS if hasattr(net, name))
    layers = dict(getattr(net, classifier).named_modules(prefix=classifier))
    linear = [path for path, layer in layers.items() if isinstance(layer, nn.Linear)]
    conv = [path for path, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    parent, _, child = (linear or conv)[-1].rpartition(".")
    setattr(net.get_submodule(parent), child, nn.Identity())
    # In train mode GoogLeNet and Inception would return the logits of auxiliary classifiers too.
    for name, value in (("aux_logits", False), ("aux1", None), ("aux2", None), ("AuxLogits", None)):
        if hasattr(net, name):
            setattr(net, name, value)


def load_weights(net: nn.Module, name: str, path: str) -> None:
    """Load a state dict into a model without classifier; what the file holds beyond that is ignored.

    Raises ValueError when the file is no state dict of this model.
    """
    try:
        state = load_tensors(Path(path), "cpu")
    except (OSError, ValueError) as error:
        raise ValueError(f"--weights {path} cannot be read as a state dict of {name}: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"--weights {path} holds a {type(state).__name__}, not a state dict of {name}")
    own = net.state_dict()
    fits = {key: state[key] for key in own if getattr(state.get(key), "shape", None) == own[key].shape}
    # Files of old versions of torch lack the counters of batch norm.
    missing = [key for key in own if key not in fits and not key.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(
            f"--weights {path} is not a state dict of {name}: {len(missing)} of its {len(own)} tensors are "
            f"missing or have another shape, first {missing[0]!r}"
        )
    own.update(fits)
    net.load_state_dict(own)


def take_blocks(net: nn.Module) -> list[nn.Module]:
    """Move the blocks that make the feature map out of `net`, which keeps the tail; [] if it makes none.

    Norms, activations and pooling belong to the block before them.
    """
    names = next((names for names in TRUNKS if all(hasattr(net, name) for name in names)), ())
    blocks: list[list[nn.Module]] = []
    for name in names:
        part = getattr(net, name)
        for child in part.children() if isinstance(part, nn.Sequential | nn.ModuleList) else [part]:
            follows = isinstance(child, nn.BatchNorm2d | nn.LayerNorm) or not list(child.parameters())
            if blocks and follows:
                blocks[-1].append(child)
            else:
                blocks.append([child])
        setattr(net, name, nn.Sequential())
    return [nn.Sequential(*block) for block in blocks]


class TorchvisionBackbone(Backbone):
    """A torchvision classification model for square images of `img_size` pixels, without its classifier.

    `weights` is 'none', 'DEFAULT' (torchvision's, downloaded) or the path of a state dict. Raises ValueError
    for an unknown name, weights that cannot be had, or an image size that the model refuses.
    """

    native_img_size = 224

    def __init__(self, name: str, img_size: int = 224, weights: str = "none"):
        super().__init__()
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            close = ", ".join(difflib.get_close_matches(name, known) or ["resnet50", "convnext_tiny", "..."])
            raise ValueError(f"torchvision has no classification model {name!r}: try {close}")
        if weights == "DEFAULT":
            net = pretrained_network(name)
        else:
            net = torchvision.models.get_model(name, weights=None)
        if hasattr(net, "transform_input"):
            # GoogLeNet's and Inception's weights expect inputs in [-1, 1], also when a checkpoint brings them.
            net.transform_input = True  # type: ignore[assignment]
        remove_classifier(net)
        if weights not in ("DEFAULT", "none"):
            load_weights(net, name, weights)
        blocks = take_blocks(net)
        if isinstance(net, torchvision.models.MNASNet):  # it takes no state dict that was copied to a plain dict
            net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.classifier)
        self.layers = nn.ModuleList(blocks or [net])
        self.tail = net if blocks else nn.Identity()
        self.eval()
        try:
            with torch.no_grad():
                feature_map = self.feature_map(torch.zeros(1, 3, img_size, img_size))
                c, h, w = feature_map.shape[1:]
                self.map_shape = (c, h, w)
                self.feature_dim: int = self.pool_and_flatten(feature_map).shape[1]
        except (AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{name} cannot take images of {img_size} pixels ({reason}): give another --img_size, such as 224"
            ) from error
        self.train()

    def pool_and_flatten(self, feature_map: Tensor) -> Tensor:
        """(b, c, h', w') -> (b, d): what the model does between its feature map and its classifier."""
        return self.tail(feature_map).flatten(1)

    def feature_map(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, c, h', w'), before the pooling; (b, d, 1, 1) from a model without a map."""
        x = super().feature_map(x)
        return x if x.dim() == 4 else x[:, :, None, None]
