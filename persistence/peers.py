"""The networks of other repositories' checkpoints: which of ours each is, what it calls the weights, what it is shown.

A row of PEERS gives, of one network of a repository, our backbone and a function from our name of a tensor to theirs.
Read from right to left it imports a file, from left to right it exports one. Several rows may fit a file, since names
and shapes do not tell how the last map becomes features, or how images are normalised and resized: then `--from` tells.
The facts were read from the repositories' code and are tested against outputs of their networks (tests/golden).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from engine.normalisation import IMAGENET, Normalisation
from models import build_backbone

Names = Callable[[str], str]
AUTHORS = "authors"


def of_bytes(mean: tuple[float, float, float], std: tuple[float, float, float]) -> Normalisation:
    """A normalisation given for values of 0..255."""
    return Normalisation.of([m / 255 for m in mean], [s / 255 for s in std])


MEAN_A = of_bytes((120.39586422, 115.59361427, 104.54012653), (70.68188272, 68.27635443, 72.54505529))


def indexed(name: str, pattern: str, conv: str = "conv", bn: str = "bn") -> str:
    """`layers.0.conv.weight` by a pattern such as `layer{i}.0.`, in which i counts from 1 and k from 0."""
    name = re.sub(r"^layers\.(\d+)\.", lambda found: pattern.format(i=int(found[1]) + 1, k=int(found[1])), name)
    return re.sub(r"\bconv\.", f"{conv}.", re.sub(r"\bbn\.", f"{bn}.", name))


def four_by_four(name: str) -> str:
    """DN4's names of Conv64F: conv, norm, LeakyReLU and, in the first two blocks, pooling are counted through."""
    places = ((0, 1), (4, 5), (8, 9), (11, 12))
    found = re.fullmatch(r"layers\.(\d)\.(conv|bn)\.(\w+)", name)
    return f"{places[int(found[1])][found[2] == 'bn']}.{found[3]}" if found else name


def residual(name: str, pattern: str = "layer{i}.0.") -> str:
    """The usual names of ResNet-12."""
    return indexed(name, pattern).replace("shortcut", "downsample")


def staged(name: str, depths: tuple[int, ...], pattern: str, shortcut: str) -> str:
    """Names of a network whose blocks are counted in each of its stages, s from 1, b from 0."""
    places = [pattern.format(s=s, b=b) for s, depth in enumerate(depths, 1) for b in range(depth)]
    name = re.sub(r"^layers\.(\d+)\.", lambda found: places[int(found[1])], name)
    name = re.sub(r"^stem\.(0\.)?(?=weight|bias)", "conv1.", name)
    return re.sub(r"^(norm|stem\.1)\.", "bn1.", name).replace("shortcut.", shortcut)


def torchvision_trunk(name: str) -> str:
    """CloserLook's names of torchvision's ResNet18."""
    name = re.sub(r"^layer(\d)\.(\d)\.", lambda found: f"trunk.{2 + 2 * int(found[1]) + int(found[2])}.", name)
    name = re.sub(r"^conv1\.", "trunk.0.", re.sub(r"^bn1\.", "trunk.1.", name))
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "BNshortcut.")
    return re.sub(r"\.bn(\d)\.", r".BN\1.", re.sub(r"\.conv(\d)\.", r".C\1.", name))


@dataclass(frozen=True)
class Peer:
    """A network of a repository.

    names: our name of a tensor -> theirs. prefixes: what may stand before it. holds: the keys of the file under which
    the state dict may lie, "" for a bare one. head: what else it may hold. resize: the rule for its images.
    zeros: our names of tensors that a network may lack, being 0 then. refused: why its features cannot be had.
    """

    backbone: str
    names: Names
    prefixes: tuple[str, ...]
    holds: tuple[str, ...]
    head: str
    normalisation: Normalisation
    resize: str
    img_size: int = 84
    zeros: str = r"(?!)"
    refused: str = ""


CONV_PAIR = partial(indexed, conv="0", bn="1")
BASIC = partial(staged, pattern="layer{s}.{b}.", shortcut="downsample.")
BIASED = partial(staged, depths=(4, 4, 4), pattern="layer{s}.{b}.", shortcut="shortcut.0.")
PREACT = partial(staged, depths=(4, 4, 4), pattern="block{s}.layer.{b}.", shortcut="convShortcut.")
RESNET18 = partial(BASIC, depths=(2, 2, 2, 2))
NO_BIAS = r".*conv\.bias"
COVARIANCES = "its last block has no pooling, and it compares covariances of that map, not features"
DESCRIPTORS = "its blocks end with LeakyReLU, the last two do not pool, and it compares local descriptors"
# What goes with all networks of a repository: prefixes, keys of the file, head, normalisation, resize rule, image size.
NO_HEAD = r"(?!)"
FEAT = (("encoder.", "encoder.module."), ("params", "state_dict", ""), r"(fc|slf_attn)\..*")
RFS = (("",), ("model", ""), r"classifier\..*", MEAN_A, "none")
METAOPTNET = (("module.", ""), ("embedding", ""), NO_HEAD, MEAN_A, "none")
META_BASELINE = (("encoder.",), ("model_sd", ""), r"classifier\..*|temp", IMAGENET, "short:80", 80)
OTHER_PARTS = r"(?!layer|block|conv1|bn1|fc|linear|classifier)\w+\..*"
LIBFEWSHOT = (("emb_func.", ""), ("", "model"), OTHER_PARTS, MEAN_A, "both:96")
CLOSERLOOK = (("feature.", ""), ("state", ""), r"classifier\..*", IMAGENET, "published")
EASYFSL = (("", "backbone."), ("", "state_dict"), r"fc\..*", IMAGENET, "both:96")
DEEPEMD = (("module.encoder.", ""), ("params", ""), r"fc\..*", of_bytes((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)))
S2M2 = (("", "module."), ("state", ""), r"linear\..*", IMAGENET, "published", 80)
DEEPBDC = (("feature.",), ("state", ""), r"dcov\..*|classifier\..*", IMAGENET, "short:92")
DN4 = (("features.", "features.features."), ("state_dict", "model", ""), NO_HEAD, IMAGENET, "both:84")
# Normalised as its code for Omniglot, and with running statistics of the last batch alone (momentum 1).
OMNIGLOT = (("",), ("",), NO_HEAD, Normalisation((0.92206,) * 3, (0.08426,) * 3), "none")
# The files of this method hold the base head beside the state dict.
PUBLISHED = (("",), ("state",), NO_HEAD, IMAGENET, "published")
# Its files do not say how images were scaled, and its `lee2019` scales them in several ways (see findings/): this
# is its `normalize`.
LEARN2LEARN = (("features.",), ("",), r"classifier\..*", Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), "none")

PEERS: dict[str, tuple[Peer, ...]] = {
    "closerlook": (
        Peer("Conv4", partial(indexed, pattern="trunk.{k}.", conv="C", bn="BN"), *CLOSERLOOK),
        Peer("ResNet18", torchvision_trunk, *CLOSERLOOK, img_size=224),
    ),
    "feat": (
        Peer("ResNet12", residual, *FEAT, MEAN_A, "short:92"),
        Peer("BiasedWideResNet", BIASED, *FEAT, IMAGENET, "short:92"),
        Peer("ResNet18_84", RESNET18, *FEAT, IMAGENET, "short:92"),
        Peer("Conv4_max", partial(CONV_PAIR, pattern="encoder.{k}."), *FEAT, IMAGENET, "short:92"),
    ),
    "rfs": (
        Peer("ResNet12", residual, *RFS),
        Peer("SEResNet12", residual, *RFS),
        Peer("BiasedWideResNet", BIASED, *RFS),
        Peer("Conv4_mean", partial(CONV_PAIR, pattern="layer{i}."), *RFS),
    ),
    "metaoptnet": (
        Peer("ResNet12_flat", residual, *METAOPTNET),
        Peer("Conv4", partial(CONV_PAIR, pattern="encoder.{k}.block."), *METAOPTNET, zeros=NO_BIAS),
    ),
    "deepemd": (Peer("ResNet12_flat", residual, *DEEPEMD, "both:92"),),
    "meta-baseline": (
        Peer("ResNet12_512", partial(residual, pattern="layer{i}."), *META_BASELINE),
        Peer("ResNet12", partial(residual, pattern="layer{i}."), *META_BASELINE),
        Peer("Conv4", partial(CONV_PAIR, pattern="encoder.{k}."), *META_BASELINE),
    ),
    "libfewshot": (
        Peer("ResNet12", residual, *LIBFEWSHOT),
        Peer("PreActWideResNet_max", PREACT, *LIBFEWSHOT),
        Peer("ResNet18_84", RESNET18, *LIBFEWSHOT),
        Peer("Conv4", partial(CONV_PAIR, pattern="layer{i}."), *LIBFEWSHOT),
    ),
    "learn2learn": (Peer("ResNet12", residual, *LEARN2LEARN), Peer("ResNet12_512", residual, *LEARN2LEARN)),
    "easyfsl": (
        Peer("ResNet12", residual, *EASYFSL),
        Peer("BasicResNet12", partial(BASIC, depths=(1, 1, 2, 1)), *EASYFSL),
        Peer("ResNet18_84", RESNET18, *EASYFSL),
    ),
    "s2m2": (Peer("PreActWideResNet", PREACT, *S2M2),),
    "deepbdc": (Peer("ResNet12", residual, *DEEPBDC, refused=COVARIANCES),),
    "dn4": (Peer("Conv4", four_by_four, *DN4, zeros=NO_BIAS, refused=DESCRIPTORS),),
    "learning-to-compare": (Peer("Conv4_relation", partial(CONV_PAIR, pattern="layer{i}."), *OMNIGLOT),),
    AUTHORS: (Peer("Conv4", partial(CONV_PAIR, pattern="nConvBlock.{k}.convBlock."), *PUBLISHED),),
}


@cache
def shapes_of(backbone: str, img_size: int) -> dict[str, torch.Size]:
    """The shape of each tensor of one of our backbones, made without numbers; batch norm's counters are left out."""
    with torch.device("meta"):
        state = build_backbone(backbone, img_size).state_dict()
    return {name: value.shape for name, value in state.items() if not name.endswith("num_batches_tracked")}


def fitted_prefix(peer: Peer, state: dict[str, Tensor]) -> str | None:
    """The prefix with which all tensors of a network are in a state dict, and nothing else but a head; else None."""
    shapes = shapes_of(peer.backbone, peer.img_size)
    for prefix in peer.prefixes:
        names = stored_names(peer, prefix, state)
        used = [state[name] for name in names.values() if name in state and state[name].is_floating_point()]
        if [value.shape for value in used] == [shapes[ours] for ours in names]:
            rest = {name.removeprefix(prefix): value for name, value in state.items() if name not in names.values()}
            if all(re.fullmatch(peer.head, name) or is_copy(name, value, used) for name, value in rest.items()):
                return prefix
    return None


def stored_names(peer: Peer, prefix: str, state: dict[str, Tensor]) -> dict[str, str]:
    """Our name of each tensor -> theirs, without those of `zeros` that a state dict lacks."""
    names = {ours: prefix + peer.names(ours) for ours in shapes_of(peer.backbone, peer.img_size)}
    return {ours: name for ours, name in names.items() if name in state or not re.fullmatch(peer.zeros, ours)}


def is_copy(name: str, value: Tensor, used: list[Tensor]) -> bool:
    """Whether a tensor says nothing new: a counter of batch norm, or one that CloserLook's blocks hold twice."""
    twice = name.startswith("trunk") and any(value.shape == u.shape and torch.equal(value, u) for u in used)
    return name.endswith("num_batches_tracked") or twice


def our_state(peer: Peer, prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of our backbone from the tensors of a peer's file."""
    names, shapes = stored_names(peer, prefix, state), shapes_of(peer.backbone, peer.img_size)
    return {ours: state[names[ours]] if ours in names else torch.zeros(shape) for ours, shape in shapes.items()}


def recognised(state: dict[str, Tensor], holds: str, asked: str | None = None) -> list[tuple[str, Peer, str]]:
    """The (repository, network, prefix) that a state dict may be of, which lay under the key `holds` of its file.

    asked: the repository that --from names, if any. A key that only some of them use tells them apart.
    """
    found = []
    for name, networks in PEERS.items():
        for peer in networks if asked in (None, name) else ():
            prefix = fitted_prefix(peer, state)
            if prefix is not None and (asked or holds in peer.holds):
                found.append((name, peer, prefix))
    return found
