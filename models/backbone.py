"""The contract of a backbone, and a backbone split in two: frozen blocks, then the trainable blocks.

Alignment and stage 1 may train the last blocks alone, beyond the paper, which trains all of them.
"""

import math

import torch
from torch import Tensor, nn

from engine.normalisation import IMAGENET, Normalisation
from engine.resizing import PUBLISHED


class Backbone(nn.Module):
    """A network for square images: blocks that make a feature map, and the pooling of that map to a feature vector.

    map_shape (c, h', w') and feature_dim d: of one image; layers: the blocks, unless `blocks` is overridden; end: how
    the map becomes features, its "mean", its "max" or itself, "flatten"; normalisation and eval_resize: of the input.
    Backbone(img_size) raises ValueError for a size that the network cannot take.
    """

    normalisation: Normalisation = IMAGENET
    eval_resize: str = PUBLISHED
    end: str = "mean"
    feature_dim: int
    map_shape: tuple[int, int, int]
    layers: nn.ModuleList

    def blocks(self) -> list[nn.Module]:
        """The blocks from input to output, which together map (b, 3, h, w) -> (b, c, h', w')."""
        return list(self.layers)

    def pool_and_flatten(self, feature_map: Tensor) -> Tensor:
        """(b, c, h', w') -> (b, d): by `end`, unless overridden."""
        if self.end == "flatten":
            return feature_map.flatten(1)
        return feature_map.amax((-2, -1)) if self.end == "max" else feature_map.mean((-2, -1))

    def feature_map(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, c, h', w')."""
        for block in self.blocks():
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, d)."""
        return self.pool_and_flatten(self.feature_map(x))


class LastBlocks(nn.Module):
    """The last `n_blocks` blocks of a backbone and its pooling, sharing its weights: input of these blocks -> (b, d).

    Parameters of the pooling, which models of libraries may have, stay with the backbone and are not trained here.
    """

    def __init__(self, backbone: Backbone, n_blocks: int):
        super().__init__()
        self.blocks = nn.Sequential(*backbone.blocks()[-n_blocks:])
        self.pool_and_flatten = backbone.pool_and_flatten
        self.only_flattens = math.prod(backbone.map_shape) == backbone.feature_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.pool_and_flatten(self.blocks(x))


def split_backbone(backbone: Backbone, n_last: int) -> tuple[nn.Sequential, LastBlocks]:
    """The blocks to freeze, and the last n_last blocks (1 to all but one) to train; composed, they are the backbone."""
    return nn.Sequential(*backbone.blocks()[:-n_last]), LastBlocks(backbone, n_last)


class PartlyFrozen(nn.Module):
    """A backbone (b, 3, h, w) -> (b, d) with all but the last n_last blocks (1 to all but one) frozen.

    Frozen blocks stay in eval mode in train(), and get no gradient.
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
