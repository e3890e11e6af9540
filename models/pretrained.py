"""Networks of others as backbones, with pretrained weights or without: any classification model of torchvision, any
image model of timm (optional), and a network that a user's own function makes.

The classifier is removed; what it was fed is the feature. A network that makes its feature map by layers, one after
another, is cut into blocks and a tail that pools; the blocks of a transformer take tokens, of which the tail takes the
class token or the mean, as the model does. Any other network, and a user's own, is a single block of map (d, 1, 1).
"""

import difflib
import importlib
import math
from collections.abc import Iterable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from engine.errors import one_line
from engine.foreign import read_foreign
from engine.normalisation import IMAGENET, Normalisation
from engine.resizing import PUBLISHED
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


class Input(NamedTuple):
    """The images that a network was trained on: their side, in pixels, how their values are normalised, and the side
    that they were resized to, or the shorter one, where that is known."""

    img_size: int
    normalisation: Normalisation
    resized: float = 0.0
    sides: str = "short"
    interpolation: str = ""

    def rule(self, img_size: int) -> str:
        """The resize rule for images of another size, the crop's share being the same."""
        if not self.resized:
            return PUBLISHED
        side = round(img_size * self.resized / self.img_size)
        return f"{self.sides}:{side}{':bicubic' if self.interpolation == 'bicubic' else ''}"


def check_name(library: str, name: str, known: list[str]) -> None:
    """Raise ValueError, with similar names, when a library does not know a name."""
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, known) or [*known[:3], "..."])
        raise ValueError(f"{library} has no classification model {name!r}: try {close}")


def torchvision_input(name: str) -> Input:
    """Image size and normalisation of the DEFAULT weights. Raises ValueError for an unknown name."""
    from torchvision import models

    check_name("torchvision", name, models.list_models(module=models))
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    normalisation, how = Normalisation.of(transforms.mean, transforms.std), transforms.interpolation.value
    return Input(transforms.crop_size[0], normalisation, transforms.resize_size[0], interpolation=how)


def timm_input(name: str) -> Input:
    """Image size and normalisation of a model's configuration. Raises ValueError without timm, for an unknown name."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"--backbone timm:{name} needs timm: pip install timm") from error
    check_name("timm", name, timm.list_models() + timm.list_pretrained())
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    side, sides = config["input_size"][-1], "both" if config["crop_mode"] == "squash" else "short"
    normalisation, resized = Normalisation.of(config["mean"], config["std"]), math.floor(side / config["crop_pct"])
    return Input(side, normalisation, resized, sides, config["interpolation"])


def torchvision_network(name: str, pretrained: bool, img_size: int) -> nn.Module:
    """A model without its classifier, its last linear layer, or the last convolution where none is linear."""
    from torchvision import models

    net = models.get_model(name, weights="DEFAULT" if pretrained else None)
    if hasattr(net, "transform_input"):
        # GoogLeNet's and Inception's weights expect inputs in [-1, 1], also when a checkpoint brings them.
        net.transform_input = True
    layers = dict(net.named_modules())
    linear = [path for path, layer in layers.items() if isinstance(layer, nn.Linear)]
    conv = [path for path, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    net.set_submodule((linear or conv)[-1], nn.Identity())
    # In train mode GoogLeNet and Inception would return the logits of auxiliary classifiers too.
    for attribute, value in (("aux_logits", False), ("aux1", None), ("aux2", None), ("AuxLogits", None)):
        if hasattr(net, attribute):
            setattr(net, attribute, value)
    return net


def timm_network(name: str, pretrained: bool, img_size: int) -> nn.Module:
    """A model without its classifier; one that takes images of one size alone, such as a transformer, for that size."""
    import timm

    size = {"img_size": img_size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    return timm.create_model(name, pretrained=pretrained, num_classes=0, **size)


NETWORKS = {"torchvision": torchvision_network, "timm": timm_network}


def library_network(library: str, name: str, img_size: int, weights: str) -> nn.Module:
    """A model of torchvision or timm without its classifier, with weights. Raises ValueError when it has none such."""
    pretrained = weights == "DEFAULT"
    try:
        net = NETWORKS[library](name, pretrained, img_size)
    except (AssertionError, OSError, RuntimeError) as error:
        if not pretrained:
            raise refused(name, img_size, error) from error
        reason = one_line(error, 200)  # no network, a broken file, or a model that has none
        raise ValueError(f"no download of {name} ({reason}): give --weights PATH of a file, or none") from error
    if weights not in ("DEFAULT", "none"):
        load_weights(net, name, Path(weights))
    return net


def refused(name: str, img_size: int, error: Exception) -> ValueError:
    """The error of an image size that a network does not take."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return ValueError(
        f"{name} cannot take images of {img_size} pixels ({reason}): give another --img_size, such as 224"
    )


# Where trainers put a state dict in a file, and what they put before its names.
STATE_KEYS = ("state_dict", "model", "state_dict_ema", "model_ema")
STATE_PREFIXES = ("", "module.", "model.", "backbone.", "module.model.", "module.backbone.")
COMMON = ("resnet18", "resnet34", "resnet50", "resnet101", "efficientnet_b0", "mobilenet_v3_large", "vit_b_16")


def load_weights(net: nn.Module, name: str, path: Path) -> None:
    """Load the state dict of a trainer's file into a model without classifier; what it holds beyond that is ignored.

    Raises ValueError when the file is of no such model, or a .safetensors without that package.
    """
    try:
        if path.suffix == ".safetensors":
            content = importlib.import_module("safetensors.torch").load_file(path)
        else:
            content = read_foreign(path)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except ImportError as error:
        raise ValueError(f"--weights {path} needs safetensors: pip install safetensors") from error
    except Exception as error:  # a damaged file of safetensors raises an exception of its own
        reason = one_line(error, 200)
        raise ValueError(f"--weights {path} cannot be read as a state dict of {name}: {reason}") from error
    state = next((content[key] for key in STATE_KEYS if isinstance(content.get(key), dict)), content)
    best, n_fit = best_fit(net, state)
    own = [key for key in net.state_dict() if not key.endswith("num_batches_tracked")]
    if n_fit < len(own):
        first = next(key for key in own if key not in best)
        raise ValueError(
            f"--weights {path} is not a state dict of {name}: {n_fit} of its {len(own)} tensors fit, not {first!r}; "
            f"the file has {', '.join(map(str, list(state)[:3]))[:120]}, ... and looks like {looks_like(state)}"
        )
    whole = net.state_dict()  # which holds the versions of its layers, too
    whole.update(best)
    net.load_state_dict(whole)


def best_fit(net: nn.Module, state: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The tensors of a state dict that fit a network, by the prefix with which most do, and how many do.

    Batch norm's counters, which old files lack, are taken and not counted.
    """
    own, fits = net.state_dict(), list[dict[str, Tensor]]()
    for prefix in STATE_PREFIXES:
        named = {key: state.get(prefix + key) for key in own}
        fits.append({key: v for key, v in named.items() if isinstance(v, Tensor) and v.shape == own[key].shape})
    best = max(fits, key=len)
    return best, sum(not key.endswith("num_batches_tracked") for key in best)


def looks_like(state: dict[str, Any]) -> str:
    """The common network of torchvision all of whose tensors a state dict has, or "none of the common networks"."""
    from torchvision import models

    for name in COMMON:
        with torch.device("meta"):
            net = models.get_model(name, weights=None)
        best, n_fit = best_fit(net, state)
        if n_fit > 0.9 * sum(not key.endswith("num_batches_tracked") for key in net.state_dict()):
            return f"torchvision:{name}"
    return "none of the common networks of torchvision"


def custom_network(name: str) -> tuple[nn.Module, Input]:
    """The network that the function FUNCTION of MODULE makes, of the name MODULE:FUNCTION, and what it takes.

    It takes images of its attributes img_size, mean and std; where it has none, those of ImageNet, of 224 pixels. Runs
    the user's code. Raises ValueError when that cannot be imported or called, or gives no such nn.Module.
    """
    module, _, function = name.partition(":")
    try:
        net = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever a user's code may raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"custom:{name} cannot be made ({reason}): expected {function}() in {module}.py") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"--backbone custom:{name} gives a {type(net).__name__}: expected a torch.nn.Module")
    size = getattr(net, "img_size", 224)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"the img_size of custom:{name} is {size!r:.40}: expected a number of pixels")
    mean, std = (getattr(net, part, getattr(IMAGENET, part)) for part in ("mean", "std"))
    return net, Input(size, Normalisation.of(mean, std))


# By library, the images that a network of this name takes; a user's own is made, to ask it.
INPUTS = {"torchvision": torchvision_input, "timm": timm_input, "custom": lambda name: custom_network(name)[1]}


def members(child: nn.Module) -> list[nn.Module]:
    """The modules of a container, or the one module itself."""
    return list(child.children()) if isinstance(child, nn.Sequential | nn.ModuleList) else [child]


@torch.no_grad()
def last_layers(net: nn.Module, image: Tensor) -> tuple[list[str], bool]:
    """The children of a timm model that end its forward_features, and whether it does anything before them.

    Each takes the very tensor that the one before gave, and nothing else. ([], False) of a model that gives no tensor.
    """
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []

    def note(name: str, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.append((name, given, named, output))

    children = dict(net.named_children())
    layers = [(name, part) for name, child in children.items() for part in members(child)]
    hooks = [part.register_forward_hook(partial(note, name), with_kwargs=True) for name, part in layers]
    end = net.forward_features(image)  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    if not isinstance(end, Tensor):
        return [], False
    names: list[str] = []
    for name, given, named, output in reversed(calls):
        if output is not end or len(given) != 1 or named:
            break
        names.append(name)
        end = given[0]
    whole = list(takewhile(lambda name: names.count(name) == len(members(children[name])), dict.fromkeys(names)))
    return whole[::-1], end is not image or len(whole) < len(set(names))


class Part(nn.Sequential):
    """Layers of a network. Tokens (b, n, d) go from part to part as a map (b, d, n, 1), features as (b, d, 1, 1).

    n_axes: of the input of the first layer.
    """

    n_axes = 4

    def forward(self, x: Tensor) -> Tensor:
        return as_map(super().forward(from_map(x, self.n_axes)))


def as_map(x: Tensor) -> Tensor:
    """Tokens (b, n, d) -> (b, d, n, 1), features (b, d) -> (b, d, 1, 1); maps stay."""
    return x if x.dim() == 4 else (x.mT if x.dim() == 3 else x.unsqueeze(2)).unsqueeze(3)


def from_map(x: Tensor, n_axes: int) -> Tensor:
    """Inverse of as_map: a map, tokens of 3 axes, or features of 2."""
    return x if n_axes == 4 else x.flatten(2).mT if n_axes == 3 else x.flatten(1)


class Embedding(nn.Module):
    """What a timm model does before the layers that were taken out of it, such as to add positions to its patches."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward_features(x)  # type: ignore[operator]


def take_layers(net: nn.Module, names: Iterable[str], embeds: bool = False) -> list[Part]:
    """Move the blocks that these children of `net` hold out of it; it keeps the tail.

    Norms, activations and pooling belong to the block before them; with `embeds` the first is what follows Embedding.
    """
    blocks: list[list[nn.Module]] = [[]] if embeds else []
    for name in names:
        for part in members(getattr(net, name)):
            follows = isinstance(part, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm) or not list(part.parameters())
            if blocks and follows:
                blocks[-1].append(part)
            else:
                blocks.append([part])
        setattr(net, name, nn.Sequential())
    return [Part(*block) for block in blocks]


class PretrainedBackbone(Backbone):
    """A network of a library, or the user's own, for square images of `img_size` pixels, without its classifier.

    name: LIBRARY:NAME, the library a key of INPUTS. weights: 'none', 'DEFAULT' (the library's, downloaded) or the path
    of a state dict. Raises ValueError for an unknown name, weights that cannot be had, or an image size that the
    network refuses.
    """

    def __init__(self, name: str, img_size: int, weights: str = "none"):
        super().__init__()
        library, _, model = name.partition(":")
        if library == "custom":
            net, taken = custom_network(model)
        else:
            taken = INPUTS[library](model)
            net = library_network(library, model, img_size, weights)
        self.normalisation, self.eval_resize = taken.normalisation, taken.rule(img_size)
        self.embeds = self.permuted = False
        self.eval()
        try:
            self.cut(net.eval(), library, torch.zeros(1, 3, img_size, img_size))
        except Exception as error:  # of whatever kind a network raises on a size that it was not made for
            raise refused(model, img_size, error) from error
        self.train()

    @torch.no_grad()
    def cut(self, net: nn.Module, library: str, image: Tensor) -> None:
        """Take the network apart, and find the shapes of what its parts make of an image (1, 3, s, s)."""
        names: Iterable[str] = ()
        if library == "timm":
            names, self.embeds = last_layers(net, image)
        elif library == "torchvision":
            names = next((names for names in TRUNKS if all(hasattr(net, name) for name in names)), ())
        blocks = take_layers(net, names, self.embeds)
        if blocks and type(net).__name__ == "MNASNet":  # which loads no state dict that was copied to a plain dict
            net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), cast(nn.Module, net.classifier))
        self.layers = nn.ModuleList(blocks or [net])
        self.tail = net if blocks else nn.Identity()
        x = image
        for part in cast(list[Part], self.blocks()):
            part.n_axes = x.dim()
            x = nn.Sequential.forward(part, x)
        self.n_axes = x.dim()
        if self.n_axes == 4 and x.shape[1] != x.shape[3] == getattr(net, "num_features", None):  # such as Swin's
            self.permuted = True
            cast(Part, self.layers[-1]).append(importlib.import_module("torchvision.ops").Permute([0, 3, 1, 2]))
        if library == "custom" and self.n_axes != 2:
            raise ValueError(f"it gives {tuple(x.shape)} of one image, not (1, d)")
        feature_map = self.feature_map(image)
        c, h, w = feature_map.shape[1:]
        self.map_shape = (c, h, w)
        self.feature_dim = self.pool_and_flatten(feature_map).shape[1]

    def blocks(self) -> list[nn.Module]:
        """The blocks from input to output, the first of them after what embeds the image where that is no layer."""
        layers: list[nn.Module] = [part if isinstance(part, Part) else Part(part) for part in self.layers]
        return [Part(Embedding(self.tail), *layers[0].children()), *layers[1:]] if self.embeds else layers

    def pool_and_flatten(self, feature_map: Tensor) -> Tensor:
        """(b, c, h', w') -> (b, d): what the model does between its feature map and its classifier."""
        x = feature_map.permute(0, 2, 3, 1) if self.permuted else from_map(feature_map, self.n_axes)
        return getattr(self.tail, "forward_head", self.tail)(x).flatten(1)
