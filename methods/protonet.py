"""ProtoNet: Snell, Swersky and Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017.

The prototype of a class is the mean of its support features; a query scores minus its squared Euclidean distance to
each prototype, and the loss is the cross-entropy. Distances are computed in float32, under autocast too, and around the
mean prototype, where they lose less to rounding.
"""

import torch
from torch import Tensor

from methods.meta_learner import MetaLearner


def protonet_scores(z_support: Tensor, z_query: Tensor) -> Tensor:
    """Minus the squared distances to the prototypes, eq. 1-2 of the paper, in float32.

    z_support (..., n_way, n_shot, d), z_query (..., n_query_total, d) -> (..., n_query_total, n_way).
    """
    with torch.autocast(z_query.device.type, enabled=False):
        prototypes = z_support.float().mean(-2)
        # Distances do not change when everything is shifted, so the shift takes no part in the gradient.
        origin = prototypes.detach().mean(-2, keepdim=True)
        p, q = prototypes - origin, z_query.float() - origin
        cross = q @ p.transpose(-2, -1)
        return 2.0 * cross - q.square().sum(-1, keepdim=True) - p.square().sum(-1).unsqueeze(-2)


class ProtoNet(MetaLearner):
    """ProtoNet on features; its loss is the cross-entropy of its scores, which the temperature divides."""

    def forward(self, z_support: Tensor, z_query: Tensor) -> Tensor:
        """z_support (..., n_way, n_shot, d), z_query (..., n, d) -> scores (..., n, n_way)."""
        return protonet_scores(z_support, z_query) / self.temperature
