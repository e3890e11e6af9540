"""What turns images into features (backbones) and features into scores (heads)."""

from collections.abc import Sequence

from torch import Generator

from models.conv4 import Conv4
from models.heads import Head, arcMax, cosMax, softMax

BACKBONES = {"Conv4": Conv4}
HEADS = ("softMax", "cosMax", "arcMax")


def native_img_size(name: str) -> int:
    """The image side, in pixels, that a backbone is published with."""
    return BACKBONES[name].native_img_size


def build_backbone(name: str, img_size: int) -> Conv4:
    """A freshly initialised backbone; its output has `.feature_dim` features. Raises ValueError if unknown."""
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    return BACKBONES[name](img_size=img_size)


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
