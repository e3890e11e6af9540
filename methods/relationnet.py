"""RelationNet: Sung et al., Learning to Compare: Relation Network for Few-shot Learning, CVPR 2018.

A class is the mean of its support feature maps. A small network, learned with the backbone, looks at each
pair of a class's map and a query's map, stacked on channels, and scores it: two blocks of 3x3 convolution,
batch norm, ReLU and 2x2 max pooling, then two linear layers. `mse` has a sigmoid at the end and regresses to
the one-hot labels, as in the paper; `softmax` has none and takes the cross-entropy over the classes
(RelationNet_softmax of Chen et al., ICLR 2019).

Batch norm has momentum 1, as published: in eval mode every novel episode is normalised by the statistics of the last
training episode, and no query sees another. In train mode give one episode at a time.

Departures: the first convolution is applied to the n_way class maps and to the n query maps apart, whose sums are the
n * n_way pairs. Maps below 4 pixels, too small for two poolings, are pooled with partial windows.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from methods.meta_learner import MetaLearner
from models.heads import one_hot_of


class RelationNet(MetaLearner):
    """The relation module on maps of shape (c, h, w), `mse` or `softmax`; `hidden`: width of its linear layers.

    The temperature divides the inputs of the sigmoid or the softmax.
    """

    uses_maps = True
    takes_means = True

    def __init__(self, feature_dim: int, map_shape: tuple[int, int, int], kind: str = "mse", hidden: int = 8):
        super().__init__(feature_dim, map_shape)
        self.kind = kind
        c, h, w = map_shape
        # As published, small maps are padded. The rounding up matters below 4 pixels alone.
        self.padding = 1 if h < 10 and w < 10 else 0
        tiny = min(h, w) < 4
        shrink = 2 - 2 * self.padding
        for _ in range(2):
            h, w = (math.ceil((x - shrink) / 2) if tiny else (x - shrink) // 2 for x in (h, w))
        self.conv1 = nn.Conv2d(2 * c, c, 3, padding=self.padding)
        self.norm1 = nn.BatchNorm2d(c, momentum=1.0)
        self.conv2 = nn.Conv2d(c, c, 3, padding=self.padding)
        self.norm2 = nn.BatchNorm2d(c, momentum=1.0)
        self.pool = nn.MaxPool2d(2, ceil_mode=tiny)
        self.fc1 = nn.Linear(c * h * w, hidden)
        self.fc2 = nn.Linear(hidden, 1)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, 0.0, math.sqrt(2.0 / (3 * 3 * c)))

    def pair_maps(self, prototypes: Tensor, queries: Tensor) -> Tensor:
        """The first convolution of all pairs: (E, n_way, c, h, w), (E, n, c, h, w) -> (E * n * n_way, c, ...)."""
        of_prototype, of_query = self.conv1.weight.chunk(2, dim=1)
        p = F.conv2d(prototypes.flatten(0, 1), of_prototype, self.conv1.bias, padding=self.padding)
        q = F.conv2d(queries.flatten(0, 1), of_query, padding=self.padding)
        p, q = p.unflatten(0, prototypes.shape[:2]), q.unflatten(0, queries.shape[:2])
        return (q.unsqueeze(2) + p.unsqueeze(1)).flatten(0, 2)

    def forward(self, map_support: Tensor, map_query: Tensor) -> Tensor:
        """map_support (..., n_way, n_shot, c, h, w), map_query (..., n, c, h, w) -> scores (..., n, n_way)."""
        prototypes = map_support.mean(-4)
        n_way, map_shape = prototypes.shape[-4], prototypes.shape[-3:]
        n = map_query.shape[-4]
        pairs = self.pair_maps(prototypes.reshape(-1, n_way, *map_shape), map_query.reshape(-1, n, *map_shape))
        x = self.pool(F.relu(self.norm1(pairs)))
        x = self.pool(F.relu(self.norm2(self.conv2(x))))
        scores = self.fc2(F.relu(self.fc1(x.flatten(1)))).float()
        scores = scores.reshape(*map_query.shape[:-3], n_way) / self.temperature
        return scores.sigmoid() if self.kind == "mse" else scores

    def loss(self, scores: Tensor, y_query: Tensor) -> Tensor:
        """scores (..., n, n_way), y_query (n,) -> scalar: mean squared error to one-hot, or cross-entropy."""
        if self.kind == "softmax":
            return super().loss(scores, y_query)
        return F.mse_loss(scores, one_hot_of(y_query, scores.shape[-1]).expand_as(scores))
