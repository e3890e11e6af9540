"""Centroid alignment: equations 4-5 of Afrasiyabi et al., ECCV 2020.

Related base samples are pulled to the centroid of the novel class that they were assigned to, and away from the
other centroids: the negative log-likelihood of a softmax over minus squared Euclidean distances.
"""

import torch.nn.functional as F
from torch import Tensor

from models.heads import one_hot_of


def class_centroids(z: Tensor, y: Tensor, n_class: int = -1) -> Tensor:
    """Mean of the features of each class: z (n, d), y (n,) with every class in it -> (n_class, d), in float32.

    Without n_class a GPU waits until y is counted.
    """
    member = one_hot_of(y, int(y.max()) + 1 if n_class < 0 else n_class).T
    return member @ z.float() / member.sum(1, keepdim=True)


def centroid_alignment_loss(
    z_support: Tensor, y_support: Tensor, z_related: Tensor, y_related: Tensor, n_way: int = -1
) -> Tensor:
    """Mean of -log softmax_k(-|z - mu_k|^2) at the assigned class, mu_k the mean of the support of class k.

    z_support (k, d), y_support (k,) with every novel class in it, z_related (n, d), y_related (n,) -> scalar. No
    temperature, features not normalised, in float32; the gradient flows through related samples and centroids.
    Equations 4-5; n_way as in class_centroids.
    """
    centroids = class_centroids(z_support, y_support, n_way)
    distance = (z_related.float().unsqueeze(1) - centroids).square().sum(2)
    return F.cross_entropy(-distance, y_related)
