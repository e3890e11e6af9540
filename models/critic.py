"""The critic of adversarial alignment: a two-layer network without a sigmoid (Arjovsky et al., ICML 2017).

linear([feature, one-hot label] -> hidden), ReLU, linear(hidden -> 1). The label makes it compare class
by class.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models.heads import one_hot_of


class Critic(nn.Module):
    """The critic h([z, y]) of d features and `n_way` labels; its initial weights come from `generator`."""

    def __init__(self, d: int, n_way: int, hidden: int = 1024, generator: Generator | None = None):
        super().__init__()
        self.n_way = n_way
        self.hidden = nn.utils.skip_init(nn.Linear, d + n_way, hidden)
        self.out = nn.utils.skip_init(nn.Linear, hidden, 1)
        for layer in (self.hidden, self.out):
            bound = 1.0 / math.sqrt(layer.in_features)
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """z (n, d), y (n,) in 0..n_way-1 -> scores (n,)."""
        return self.out(F.relu(self.hidden(torch.cat([z, one_hot_of(y, self.n_way).to(z)], dim=1)))).squeeze(1)
