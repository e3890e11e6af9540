"""What a backbone must give, and a backbone in two: the blocks that stand still, and the last ones.

Alignment may update the last blocks alone; what the others make of an image is then computed once. Stage 1 may train
the last ones alone. Beyond the paper, which updates all blocks.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from engine.normalisation import IMAGENET, Normalisation


class Backbone(nn.Module):
    """A network for square images: a list of blocks, and what is done with the map that the last one makes.

    native_img_size: the side, in pixels, that it is published with; map_shape (c, h', w') and feature_dim d: of one
    image; layers: its blocks, unless `blocks` says otherwise; normalisation: of the images that it takes. Made as
    Backbone(img_size), which raises ValueError for a size that it cannot take.
    """

    native_img_size: ClassVar[int]
    normalisation: Normalisation = IMAGENET
    feature_dim: int
    map_shape: tuple[int, int, int]
    layers: nn.ModuleList

    @classmethod
    def for_relation(cls, img_size: int) -> "Backbone":
        """The form of it that RelationNet compares maps of, with the same parameters: itself, for most."""
        return cls(img_size)

    def blocks(self) -> list[nn.Module]:
        """The blocks from input to output: (b, 3, h, w) -> (b, c, h', w') by one after another."""
        return list(self.layers)

    def pool_and_flatten(self, feature_map: Tensor) -> Tensor:
        """(b, c, h', w') -> (b, d): the mean over the map, unless a backbone says otherwise."""
        return feature_map.mean((-2, -1))

    def feature_map(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, c, h', w')."""
        for block in self.blocks():
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, d)."""
        return self.pool_and_flatten(self.feature_map(x))


class LastBlocks(nn.Module):
    """The last `n_blocks` blocks of a backbone, sharing its weights: what block -n_blocks takes -> (b, d).

    Parameters of pool_and_flatten, which models of libraries may have, are the backbone's and none of these.
    """

    def __init__(self, backbone: Backbone, n_blocks: int):
        super().__init__()
        self.blocks = nn.Sequential(*backbone.blocks()[-n_blocks:])
        self.pool_and_flatten = backbone.pool_and_flatten

    def forward(self, x: Tensor) -> Tensor:
        return self.pool_and_flatten(self.blocks(x))


def split_backbone(backbone: Backbone, n_last: int) -> tuple[nn.Sequential, LastBlocks]:
    """The blocks below the last n_last (1 to all but one), and those: one after the other, the backbone."""
    return nn.Sequential(*backbone.blocks()[:-n_last]), LastBlocks(backbone, n_last)


class PartlyFrozen(nn.Module):
    """A backbone (b, 3, h, w) -> (b, d) of which all but the last n_last blocks (1 to all but one) stand still.

    These stay in eval mode, whatever the mode of the rest, and get no gradient from then on.
    """

    def __init__(self, backbone: Backbone, n_last: int):
        super().__init__()
        self.backbone = backbone
        self.below, self.last = split_backbone(backbone, n_last)
        self.below.requires_grad_(False)

    def train(self, mode: bool = True) -> "PartlyFrozen":
        super().train(mode)
        self.below.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.below(x)
        features: Tensor = self.last(x)
        return features
