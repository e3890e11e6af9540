"""The contract of a meta-learner of stage 2."""

from abc import abstractmethod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn


class MetaLearner(nn.Module):
    """Scores of query samples, given the support: made as MetaLearner(feature_dim, map_shape) for one backbone.

    uses_maps: whether it works on the backbone's maps instead of its features. takes_means: whether its scores depend
    only on the mean of each class's support. temperature: divides the logits; 1 as published.
    """

    uses_maps: ClassVar[bool] = False
    takes_means: ClassVar[bool] = False
    temperature: float = 1.0

    def __init__(self, feature_dim: int, map_shape: tuple[int, int, int]):
        super().__init__()

    @abstractmethod
    def forward(self, z_support: Tensor, z_query: Tensor) -> Tensor:
        """z_support (..., n_way, n_shot, d), z_query (..., n, d) -> scores (..., n, n_way); (..., c, h, w) for d if
        uses_maps."""

    def loss(self, scores: Tensor, y_query: Tensor) -> Tensor:
        """Mean cross-entropy over all queries, unless a learner says otherwise: (..., n, n_way), (n,) -> scalar."""
        return F.cross_entropy(scores.flatten(0, -2), y_query.expand(scores.shape[:-1]).flatten())
