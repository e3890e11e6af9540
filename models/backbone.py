"""A backbone in two: the blocks that stand still, and the last ones, which alignment may update alone.

What the first part makes of an image can then be computed once. Beyond the paper, which updates all blocks.
"""

from torch import Tensor, nn

from models import Backbone


class LastBlocks(nn.Module):
    """The last `n_blocks` blocks of a backbone, sharing its weights: what block -n_blocks takes -> (b, d)."""

    def __init__(self, backbone: Backbone, n_blocks: int):
        super().__init__()
        self.blocks = nn.Sequential(*backbone.blocks()[-n_blocks:])
        self.pool_and_flatten = backbone.pool_and_flatten

    def forward(self, x: Tensor) -> Tensor:
        return self.pool_and_flatten(self.blocks(x))


def split_backbone(backbone: Backbone, n_last: int) -> tuple[nn.Sequential, LastBlocks]:
    """The blocks below the last n_last, (b, 3, h, w) -> (b, c, h', w'), and those: one after the other, the backbone.

    Raises ValueError when fewer than 1 or all blocks would be the last.
    """
    blocks = backbone.blocks()
    if not 1 <= n_last < len(blocks):
        raise ValueError(f"{n_last} last blocks of a backbone of {len(blocks)}: expected 1 to {len(blocks) - 1}")
    return nn.Sequential(*blocks[:-n_last]), LastBlocks(backbone, n_last)
